"""The steps of the workflow on this machine: python .ci/workflow.py [--run]

Checks .github/workflows/book.yml with jactionlint (a fork of actionlint that installs from the package index) and lists the
commands of every job. With --run they are run, each job in a fresh virtual environment; what GitHub's own actions do is left out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "book.yml"


def lint(path: Path = WORKFLOW) -> subprocess.CompletedProcess:
    """What actionlint would say, one finding a line."""
    program = Path(sys.executable).with_name("jactionlint")
    command = [program, "--profile=correctness", "--shellcheck=", "--oneline", "--no-hints", path]
    return subprocess.run(command, capture_output=True, text=True)


def commands(path: Path = WORKFLOW) -> dict[str, list[tuple[str, dict]]]:
    """Job: its commands in order, with the variables that the workflow sets for them."""
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = {}
    for name, job in workflow["jobs"].items():
        variables = {key: str(value) for key, value in job.get("env", {}).items()}
        found[name] = [(step["run"], variables) for step in job["steps"] if "run" in step]
    return found


def main() -> None:
    """Check, list, and run if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the commands")
    run = parser.parse_args().run
    said = lint()
    print(said.stdout, end="")
    if said.returncode:
        sys.exit(said.returncode)
    for job, steps in commands().items():
        for command, variables in steps:
            print(f"{job}:", *(f"{key}={value}" for key, value in variables.items()), command, flush=True)
            if run:
                with tempfile.TemporaryDirectory() as folder:
                    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
                    script = f"source {folder}/bin/activate && {command}"
                    subprocess.run(["bash", "-ec", script], cwd=ROOT, env=os.environ | variables, check=True)


if __name__ == "__main__":
    main()
