"""Under pytest a chapter fails where it calls a library in a way that will go.

`FutureWarning` is an error in its kernel, `DeprecationWarning` one where a cell
itself is the caller. nbval starts the kernel when a chapter's first cell is set
up; what else the tests start does not see this.
"""

import pytest

OLD_NAMES = ("is_gradient_checkpointing", "gradient_checkpointing_enable")
FILTERS = (
    "error::FutureWarning",
    "error::DeprecationWarning:__main__",
    # PEFT 0.21 still uses transformers' old names; no cell does
    *(f"ignore:`{name}` is deprecated:FutureWarning" for name in OLD_NAMES),
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Set the filters while a kernel may start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNINGS", ",".join(FILTERS))
        return (yield)
