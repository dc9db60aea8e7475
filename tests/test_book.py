"""The book itself: chapter template, Colab cells, pins, configuration, what a build refuses. (The built site: `test_site`.)"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
URL = CONFIG["repository"]["url"]
COMMANDS = {
    "build": "pip install -r requirements.txt && jupyter-book build .",
    "test": "pip install -r requirements.txt && pytest",
}

every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def section(notebook, heading):
    """All Markdown under a heading, in cells and in Markdown outputs, up to the next heading of that level."""
    text = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text += cell.source + "\n"
        for output in cell.get("outputs", []):
            text += "".join(output.get("data", {}).get("text/markdown", "")) + "\n"
    match = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert match, f"no heading '## {heading}'"
    return match.group(1)


def output_texts(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text", "")
            yield json.dumps({kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")})


def test_there_are_chapters():
    assert CHAPTERS


@every_chapter
def test_template(path):
    notebook = read(path)
    first = notebook.cells[0].source
    assert re.match(r"# \S", first)
    assert re.search(r"^\*\*Prerequisites:\*\* \S", first, re.M)
    time = re.search(r"^\*\*Time:\*\*(.*?)(?=\n\n|\Z)", first, re.M | re.S).group(1)
    assert "CPU" in time and "GPU" in time
    for heading in ("What you will learn", "What we saw"):
        assert len(re.findall(r"^- ", section(notebook, heading), re.M)) == 3, heading
    exercises = section(notebook, "Exercises")
    assert len(re.findall(r"^\*\*\d+\.\*\*", exercises, re.M)) >= 3
    assert exercises.count("{admonition} Solution") == len(re.findall(r"^\*\*\d+\.\*\*", exercises, re.M))
    assert len(re.findall(r"^- ", section(notebook, "References"), re.M)) >= 1
    assert any("{admonition} Predict" in cell.source for cell in notebook.cells)


@every_chapter
def test_executed_once_in_order_with_outputs(path):
    cells = [cell for cell in code_cells(read(path)) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) / 2
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


@every_chapter
def test_outputs_are_clean(path):
    assert path.stat().st_size < 300_000
    for text in output_texts(read(path)):
        for unwanted in ("Warning", "WARNING", "it/s]", "s/it]", "Traceback", "/tmp/", "/work/", "/home/", "/root/", "100%|"):
            assert unwanted not in text, (unwanted, text[:200])


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_figure_shows_the_records():
    drawn = script("readme_figure")
    table = drawn.scores()
    assert Image.open(drawn.PICTURE).info["Description"] == drawn.fingerprint(table)
    counts = table.groupby(["task", "approach"]).size()
    assert set(counts.index.get_level_values("task")) == set(drawn.TASKS.values()) and counts.min() >= 3
    for task in drawn.TASKS.values():  # the same seeds for both approaches
        assert counts[task].drop(drawn.ENCODER, errors="ignore").nunique() == 1


def test_on_what_and_when_every_chapter_was_executed():
    execute = script("execute")
    for path in CHAPTERS:
        made = read(path).metadata["executed"]
        pins = (ROOT / "requirements.txt").read_text().splitlines()
        assert [f"{name}=={of}" for name, of in made["versions"].items() if f"{name}=={of.split('+')[0]}" not in pins] == [], path
    assert execute.machine_table() in (ROOT / "book" / "machine.md").read_text()


@every_chapter
def test_figures_have_alt_text(path):
    for cell in code_cells(read(path)):
        for output in cell.outputs:
            data = output.get("data", {})
            bare = {"image/png", "image/svg+xml", "image/jpeg"} & set(data)
            assert not bare, "show figures with helpers.plots.with_alt_text"
            for tag in re.findall(r"<img [^>]*>", "".join(data.get("text/html", ""))):
                assert len(re.search(r'alt="([^"]*)"', tag).group(1)) > 30


@every_chapter
def test_some_outputs_are_compared(path):
    assert any("nbval-check-output" in cell.metadata.get("tags", []) for cell in code_cells(read(path)))


@every_chapter
def test_colab_cell_fetches_this_book_and_leaves_torch_alone(path):
    cell = code_cells(read(path))[0].source
    assert f"git clone -q --depth 1 {URL} " in cell
    command = re.search(r"!(sed .*?) > colab.txt", cell).group(1).replace("../requirements.txt", "requirements.txt")
    kept = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installed = [line for line in kept.splitlines() if line and not line.startswith("#")]
    assert not any(re.match(r"torch\b", line) for line in installed)
    pins = set((ROOT / "requirements.txt").read_text().splitlines())
    assert {"transformers", "trl", "peft", "bitsandbytes"} <= {line.split("==")[0] for line in installed}
    assert [line for line in installed if line not in pins] == ["huggingface_hub==1.33.0"]  # why: test_colab.py
    assert not any(line.startswith(("jupyter-book", "ipython")) for line in installed)


def test_every_requirement_is_pinned_once_and_installed_as_pinned():
    from importlib.metadata import version

    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert len(names) == len(set(names))
    for line in lines[:30]:
        name, pinned = line.split("==")
        assert version(name).split("+")[0] == pinned


def test_helpers_are_installed_with_the_pins_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    found = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "helpers").rglob("__init__.py")}
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in found)
    assert not any(fnmatch(name, pattern) for name in ("book", "tests") for pattern in patterns)
    version = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert project["project"]["version"] == version


def addresses_in(folder):
    """Of this book: in the notebooks, which fetch it on Colab, and for those who cite it."""
    found = set(re.findall(r'^repository-code: "(.*)"', (folder / "CITATION.cff").read_text(), re.M))
    for path in (folder / "book").glob("*.ipynb"):
        text = "\n".join(cell.source for cell in read(path).cells)
        found |= set(re.findall(r"git clone [^\n]*?(https://\S+)", text)) | set(
            re.findall(r"https://github\.com/\S+(?=/blob/)", text)
        )
    return found


def test_address_is_the_same_everywhere_or_one_command_makes_it_so(tmp_path):
    assert addresses_in(ROOT) == {URL}, "python .ci/address.py writes the address of _config.yml"
    (tmp_path / "book").mkdir()
    for path in (ROOT / "_config.yml", ROOT / "CITATION.cff", *CHAPTERS):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    config = tmp_path / "_config.yml"
    config.write_text(config.read_text().replace(URL, "https://github.com/somebody/a-fork"))
    script("address").main(tmp_path)
    assert addresses_in(tmp_path) == {"https://github.com/somebody/a-fork"}
    config.write_text(config.read_text().replace("https://github.com/somebody/a-fork", URL))
    script("address").main(tmp_path)
    for path in (ROOT / "CITATION.cff", *CHAPTERS):
        assert (tmp_path / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_pages_link_to_files_of_the_book_without_its_address():
    """So that a link works on GitHub, in JupyterLab and on the site of a fork."""
    for path in (*(ROOT / "book").glob("*.md"), ROOT / "README.md"):
        assert URL not in path.read_text(), path.name


def test_readme_and_ci_give_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    blocks = [block.strip() for block in re.findall(r"```bash\n(.*?)```", readme, re.S)]
    assert blocks[:2] == [COMMANDS["build"], COMMANDS["test"]]
    assert COMMANDS["test"] in (ROOT / ".ci" / "run").read_text().splitlines()
    workflow = (ROOT / ".github" / "workflows" / "book.yml").read_text()
    assert all(f"- run: {command}\n" in workflow for command in COMMANDS.values())


def test_the_workflow_passes_actionlint_and_faults_do_not(tmp_path):
    check = script("workflow")
    result = check.lint()
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr
    assert [command for steps in check.commands().values() for command, _ in steps] == [
        COMMANDS["test"],
        COMMANDS["build"],
        "python .ci/pdf.py",
    ]
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(check.WORKFLOW.read_text().replace("needs: [test, site]", "needs: [tests, site]"))
    result = check.lint(wrong)
    assert result.returncode == 1 and "undefined-job-needs" in result.stdout


def test_the_workflow_caches_what_changes_its_downloads():
    """The file with the hashes of all packages is in the keys, and each job keeps a cache of its own."""
    jobs = yaml.safe_load(script("workflow").WORKFLOW.read_text())["jobs"]
    fetching = {path.name for path in (ROOT / "helpers").glob("*.*") if re.search(r'"[0-9a-f]{64}"', path.read_text())}
    assert fetching == {"downloads.json"}
    keys = {}
    for job in ("test", "site"):
        steps = {step["uses"].split("@")[0]: step["with"] for step in jobs[job]["steps"] if "uses" in step}
        assert steps["actions/setup-python"]["cache-dependency-path"] == "requirements.txt"
        keys[job] = steps["actions/cache"]["key"]
        assert fetching <= set(re.findall(r"helpers/([\w.]+)", keys[job]))
        assert keys[job].startswith(steps["actions/cache"]["restore-keys"])
    assert keys["test"] != keys["site"]


def test_toc_lists_every_chapter_and_only_the_quickstart_runs():
    listed = re.findall(r"file: (\S+)", (ROOT / "_toc.yml").read_text())
    assert {f"book/{path.stem}" for path in CHAPTERS} <= set(listed)
    excluded = CONFIG["execute"]["exclude_patterns"]
    live = [path.name for path in CHAPTERS if not any(path.relative_to(ROOT).match(pattern) for pattern in excluded)]
    assert live == ["00_quickstart.ipynb"]
    assert CONFIG["execute"]["execute_notebooks"] == "force"


def test_style():
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def build(folder, out, *options):
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(folder), "--path-output", str(out), *options]
    extensions = {"PYTHONPATH": str(ROOT / "book" / "_ext")}  # for a _config.yml that lies elsewhere
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | extensions)


def test_packages_installed_inside_the_checkout_are_no_pages_and_unknown_words_fail(tmp_path):
    for folder in (".venv/lib/site-packages/hub", "env/lib/site-packages/hub", ".cache"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "card.md").write_text("---\n{{ card_data }}\n---\n")  # as huggingface_hub ships one
    (tmp_path / "page.md").write_text("# Page\n")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: page\n")
    (tmp_path / "_config.yml").write_text((ROOT / "_config.yml").read_text())
    for folder in ("_static", "_ext"):
        shutil.copytree(ROOT / "book" / folder, tmp_path / "book" / folder)
    shutil.copy(ROOT / "book" / "references.bib", tmp_path / "book")
    result = build(tmp_path, tmp_path / "out", "-W")
    assert result.returncode == 0, result.stderr[-2000:]
    (tmp_path / "page.md").write_text("# Page\n\n{term}`no such term` {cite}`nobody1900`\n")
    result = build(tmp_path, tmp_path / "out", "-W", "-n", "--keep-going")
    assert result.returncode != 0
    assert "no such term" in result.stderr and "nobody1900" in result.stderr


def test_the_first_use_of_a_term_is_linked_and_no_other_word():
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    import terms

    names = {"token": "a", "LoRA": "b", "special token": "c", "trie": "d", "macro-F1": "e", "LoRA rank": "b"}

    def linked(text):
        parts = terms.split(text, set(), names, terms.pattern(list(names)), "glossary.html")
        return [(part["refuri"], part.astext()) for part in parts if not isinstance(part, str)]

    assert linked("Tokens and a special\ntoken, and a token.") == [
        ("glossary.html#a", "Tokens"),
        ("glossary.html#c", "special\ntoken"),
    ]
    assert linked("Macro-F1 tries tokenizers, Lora, sub-token.") == [("glossary.html#e", "Macro-F1")]
    assert linked("LoRA ranks, then LoRA") == [("glossary.html#b", "LoRA ranks")]


def test_a_failing_cell_fails_the_build(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Page"), nbformat.v4.new_code_cell("1 / 0")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "page.ipynb")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: page\n")
    (tmp_path / "_config.yml").write_text((ROOT / "_config.yml").read_text())
    result = build(tmp_path, tmp_path / "out")
    assert result.returncode != 0
    assert "ZeroDivisionError" in result.stdout + result.stderr


QUICKSTART = ROOT / "book" / "00_quickstart.ipynb"


def test_quickstart_has_both_approaches_ten_points_above_the_svm():
    for cell in code_cells(read(QUICKSTART)):
        for output in cell.outputs:
            if output.get("metadata", {}).get("scrapbook", {}).get("name") == "quickstart_table":
                html = output.data["text/html"]
    accuracy = {name: float(value) for name, value in re.findall(r"<th>([^<]+)</th>\s*<td>([\d.]+)</td>", html)}
    assert set(accuracy) == {"TF-IDF + linear SVM", "classification head", "instruction tuning"}
    svm = accuracy.pop("TF-IDF + linear SVM")
    assert min(accuracy.values()) >= svm + 10


def test_quickstart_shows_150_lines_of_code_and_the_stock_trainers():
    hidden = {"hide-input", "hide-cell"}
    shown = [cell.source for cell in code_cells(read(QUICKSTART)) if not hidden & set(cell.metadata.get("tags", []))]
    lines = [line.strip() for line in "\n".join(shown).splitlines()]
    assert sum(bool(line) and not line.startswith("#") for line in lines) <= 150
    assert "trainer = Trainer(" in lines and "trainer = SFTTrainer(" in lines
    assert not any("LabelTokensTrainer" in line for line in lines)


PICTURES = sorted((ROOT / "book" / "_static").glob("*.svg"))


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_pictures_can_be_read_on_a_phone_and_on_a_dark_page(path):
    """At 390 pixels a page leaves a picture about 360: letters of 13 in a picture 400 wide are 12 there."""
    picture = ElementTree.parse(path).getroot()
    svg = "{http://www.w3.org/2000/svg}"
    left, top, width, height = map(float, picture.get("viewBox").split())
    ground = picture.find(f"{svg}rect")
    assert (left, top) == (0, 0) and width <= 400
    assert [ground.get(name) for name in ("width", "height", "fill")] == [f"{width:g}", f"{height:g}", "#fff"]
    assert len(picture.find(f"{svg}title").text) > 30
    sizes = [float(each.get("font-size", 99)) for each in picture.iter() if each.tag != f"{svg}tspan"]  # subscripts
    assert min(sizes) >= 13
    pages = [*(ROOT / "book").glob("*.md"), *CHAPTERS]
    assert any(f"_static/{path.name}" in page.read_text(encoding="utf-8") for page in pages)
