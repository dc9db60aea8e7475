"""A quarter of an hour with a GPU, in two calls: what only a GPU can say about this book, the most telling first.

python gpu_session.py --part 1 --out results --state state --seconds 360
python gpu_session.py --part 2 --out results --state state --seconds 330

Part 1 needs the base model's tokenizer only: versions, both approaches on a tiny model, and training steps on the shapes of
large models. Part 2 needs the base model and the data: what a prediction costs, chapters cell by cell, and a comparison of both
approaches. Everything is written the moment it is there; what fails is recorded, and the next is tried. What is recorded under
`--state` is not made again.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

TINY = os.environ.get("SESSION_TINY")  # a trial without a GPU: a random model of that folder, few and short documents
CHAPTERS = tuple(os.environ.get("SESSION_CHAPTERS", "05_instruction_tuning 04_embedding_head 00_quickstart").split())
WORKERS = int(os.environ.get("SESSION_WORKERS", 8))
SPARE = 20  # seconds before the end at which everything is stopped

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
given = argparse.Namespace()


def left() -> float:
    return given.until - time.time()


def write(name: str, record: dict) -> None:
    """Append one line to a file in both folders; it is on the disk when this returns."""
    line = json.dumps(record, ensure_ascii=False, default=str) + "\n"
    for folder in (given.state, given.out):
        with open(folder / name, "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def lines(name: str) -> list[dict]:
    """The whole lines of a file under `--state`."""
    path, found = given.state / name, []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def note(stage: str, **what) -> None:
    write("session.jsonl", {"stage": stage, "at": round(time.time() - given.start, 1), **what})


@contextlib.contextmanager
def recorded(stage: str, **what):
    """What is put into the dictionary is noted at the end of the block, and so is an error."""
    found, began = {}, time.time()
    try:
        yield found
    except Exception as error:
        tail = traceback.format_exc().strip().split("\n")[-14:]
        found |= {"failed": f"{type(error).__name__}: {str(error)[:600]}", "traceback": tail}
    note(stage, **what, **found, seconds=round(time.time() - began, 2))


def pretend() -> None:
    """For a trial on a CPU: the full profile's dtypes."""
    if not TINY:
        return
    import torch
    import transformers.modeling_utils
    import transformers.training_args

    from helpers import base_models, profiles

    profiles._of_machine = lambda: profiles.Profile("full", "cuda", torch.bfloat16, profiles._nf4(torch.bfloat16))
    transformers.modeling_utils.check_and_set_device_map = lambda d: None if d is None else {"": torch.device("cpu")}
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    torch.cuda.get_device_name = lambda *_: "pretended GPU (a CPU)"
    fetch = base_models.fetch
    base_models.fetch = lambda name=base_models.DEFAULT: TINY if name == base_models.DEFAULT else fetch(name)
    to = torch.nn.Module.to
    torch.nn.Module.to = lambda self, *a, **o: self if a and str(a[0]) == "cuda" else to(self, *a, **o)
    torch.set_num_threads(1)


def quiet() -> None:
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


# ------------------------------------------------------------------------------------------------------------ part 1


def machine() -> None:
    with recorded("machine: nvidia-smi") as found:
        query = "name,memory.total,memory.used,driver_version,clocks.sm,clocks.max.sm,power.limit,compute_mode,mig.mode.current"
        found["said"] = _said(["nvidia-smi", f"--query-gpu={query}", "--format=csv"])
    with recorded("machine: python -m bitsandbytes") as found:
        found["said"] = _said([sys.executable, "-m", "bitsandbytes"], 45)
    with recorded("machine: versions") as found:
        from importlib.metadata import version

        names = ("torch transformers peft trl datasets bitsandbytes accelerate tokenizers huggingface_hub numpy triton pandas "
                 "scikit-learn safetensors gguf").split()
        for name in names:
            with contextlib.suppress(Exception):
                found[name] = version(name)
        found |= {"python": sys.version.split()[0], "processors": os.cpu_count()}
        found["memory"] = next(line for line in Path("/proc/meminfo").read_text().split("\n") if "MemTotal" in line)


def _said(command: list[str], seconds: float = 20) -> str:
    made = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    return f"{made.stdout[-3000:]}\n{made.stderr[-1500:]}\nexit status {made.returncode}"


def smoke() -> None:
    """Both approaches on a tiny model."""
    import tempfile

    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from helpers import adapters, base_models, embedding_head, instruction, profiles, tasks

    pretend(), quiet()
    with recorded("smoke: profile") as found:
        found["profile"] = str(profiles.current())
    tokenizer = base_models.load_tokenizer()
    folder = tempfile.mkdtemp()
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    options = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=512)
    LlamaForCausalLM(LlamaConfig(**sizes, **options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = {"sports": "match goal team coach", "tech": "chip software phone network", "politics": "vote party law minister"}
    draw = np.random.default_rng(0)

    def documents(n, part):
        texts = [f"{part} {row} " + " ".join(draw.choice(list(words.values())[row % 3].split(), 4 + row % 7)) for row in range(n)]
        return Dataset.from_dict({"text": texts, "label": [row % 3 for row in range(n)]})

    task = tasks.Task("tiny", tuple(words), documents(24, "train"), documents(6, "validation"), documents(12, "test"))
    seen, train = [], adapters.train
    adapters.train = lambda trainer: (train(trainer), seen.append(trainer))[0]
    for kind in (embedding_head.EmbeddingHead, instruction.InstructionTuned):
        settings = dict(base_model=folder, n_layers=2, epochs=2, learning_rate=1e-3)
        with recorded("smoke: fit, predict, save, load", approach=kind.__name__) as found:
            first = kind(**settings).fit(task)
            said = first.predict(task.test).probabilities
            found["trained"] = sorted({str(each.dtype) for each in first.model.parameters() if each.requires_grad})
            found["layer"] = str(type(first.model.base_model.model.model.layers[-1].self_attn.q_proj))
            found["trainer"], found["bf16"] = type(seen[-1]).__name__, seen[-1].args.bf16
            if kind is embedding_head.EmbeddingHead:
                score = first.model.base_model.model.score
                score = getattr(score, "modules_to_save", {"default": score})["default"]
                found["score"] = [type(score).__name__, str(score.weight.dtype)]
                with torch.no_grad(), torch.autocast("cpu" if TINY else "cuda", torch.bfloat16):
                    x = torch.randn(3, score.in_features, device=score.weight.device).bfloat16()
                    found["score gives"] = str(score(x).dtype)
                    found["score error"] = float((score(x) - x.float() @ score.weight.T).abs().max())
                found["names"] = [name for name in first.model.state_dict() if "score" in name]
            with tempfile.TemporaryDirectory() as stored:
                first.save(stored)
                again = kind.load(stored).predict(task.test).probabilities
            found["largest difference after load"] = float(np.abs(said - again).max())
        with recorded("smoke: same seed twice", approach=kind.__name__) as found:
            second = kind(**settings).fit(task).predict(task.test).probabilities
            found["largest difference"] = float(np.abs(said - second).max())
        with recorded("smoke: accumulation", approach=kind.__name__) as found:
            module, name = (
                (embedding_head, "TrainingArguments")
                if kind is embedding_head.EmbeddingHead
                else (instruction, "SFTConfig")
            )
            plain, losses, norms = getattr(module, name), [], []
            for size, steps in ((8, 1), (2, 4)):
                changed = dict(gradient_accumulation_steps=steps, logging_strategy="steps", logging_steps=1)
                setattr(module, name, lambda changed=changed, **options: plain(**(options | changed)))
                try:
                    kind(**settings, batch_size=size).fit(task)
                finally:
                    setattr(module, name, plain)
                history = [entry for entry in seen[-1].state.log_history if "loss" in entry]
                losses.append([entry["loss"] for entry in history])
                norms.append([entry.get("grad_norm") for entry in history])
            found |= {"losses 8x1, 2x4": losses, "gradient norms": norms}
            found["largest difference"] = max(abs(a - b) for a, b in zip(*losses, strict=True))


def bench_keys() -> list[dict]:
    """As `helpers.benchmark.keys` makes them; every recipe has the same batches, so that seconds can be compared step by step."""
    from helpers import benchmark
    from helpers.measuring import UPPER

    sweep = {
        "shapes": ["Llama-3.1-8B", "Qwen3-0.6B", "Llama-3.2-3B", "Qwen3-1.7B"],
        "lengths": [512],
        "approaches": ["instruction", "head"],
        "precision": "nf4",
        "batch_size": 8,
        "rank": 16,
        "steps": 8,
        "seed": 0,
        "recipes": [
            {"as tutorials have it": dict(kbit_preparation=True, reentrant=True, sampling="random", loss="all")},
            {"logits of the label only": dict(kbit_preparation=False, reentrant=False, loss="labels")},
            {"no checkpointing": dict(checkpointing=False)},
            {"upper ten blocks": dict(n_layers=10)},
        ],
    }
    if TINY:
        sweep |= {"shapes": [TINY], "lengths": [48], "batch_size": 4, "steps": 4, "rank": 4}
        sweep["recipes"][-1]["upper ten blocks"]["n_layers"] = 2
    found = benchmark.keys(sweep)
    order = [name for each in sweep["recipes"] for name in each]
    found.sort(key=lambda key: (sweep["shapes"].index(key["shape"]), order.index(key["name"])))
    if not TINY:  # at last the recipe as the approaches have it by default, with batches of like length
        grouped = {"name": "batches of like length", "recipe": vars(UPPER)}
        found += [key | grouped for key in found if key["name"] == "upper ten blocks" and key["shape"] == "Llama-3.1-8B"]
    return found


def bench() -> None:
    """Training steps of large shapes, each cell once; a cell that ends the process is not tried again."""
    import torch

    from helpers import benchmark, profiles
    from helpers.errors import BookError

    pretend(), quiet()
    if TINY:
        profiles._of_machine = functools.partial(profiles.Profile, "full", "cpu", torch.bfloat16)
    begun = lines("bench_begun.jsonl")
    usual = {"Llama-3.1-8B": 22, "Llama-3.2-3B": 14}
    for key in bench_keys():
        if key in begun or key["profile"] != "full":
            continue
        what = {name: key[name] for name in ("shape", "approach", "name")}
        if left() < usual.get(key["shape"], 9):
            note("bench", **what, failed="no time left for it")
            continue
        write("bench_begun.jsonl", key)
        with recorded("bench", **what) as found:
            try:
                record = benchmark.run(key)
                write("one_gpu.jsonl", record)
                found |= {"peak GB": record["peak"] / 1e9, "documents_per_second": record["documents_per_second"]}
                found["seconds of steps"] = [round(each, 4) for each in record["seconds"]]
                if torch.cuda.is_available():
                    found["reserved GB"] = torch.cuda.max_memory_reserved() / 1e9
            except (BookError, torch.OutOfMemoryError) as error:
                found["failed"] = f"does not fit: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
        if found.get("failed", "").find("CUDA error") >= 0:
            sys.exit(3)  # the context is lost; a new process goes on


# ------------------------------------------------------------------------------------------------------------ part 2


def speed() -> None:
    """What a prediction costs: the head, labels scored, generation constrained to labels, free generation."""
    with recorded("fetch") as found:
        from helpers import base_models

        pretend(), quiet()
        found["folder"] = base_models.fetch()
        (given.state / "fetched").write_text("yes")
    import torch
    from transformers import AutoModelForCausalLM

    from helpers import embedding_head, label_scoring, profiles, runs

    names = {
        "one token": ("business", "entertainment", "politics", "sports", "tech"),
        "several tokens": ("Business and finance", "Arts and entertainment", "Politics and government", "Sports news",
                           "Technology and the internet"),
    }
    tokenizer = base_models.load_tokenizer()
    key = {"task": "bbc", "options": {"per_class": 8, "n_test": 500, "tokens": 64}, "seed": 0}
    texts = [text + embedding_head.SUFFIX for text in runs.load_task(key).test["text"]]
    amounts = {1: 2, 8: 8} if TINY else {1: 4, 8: 32, 32: 96}

    def synchronized() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def head(model, prompts, labels, size):
        for _, batch in base_models.batches(prompts, tokenizer, size):
            model(**batch.to(model.device), use_cache=False).logits.float().argmax(-1).cpu()

    def scoring(model, prompts, labels, size):
        label_scoring.score_labels(prompts, labels, model, tokenizer, size).argmax(-1)

    def free(model, prompts, labels, size):
        longest = max(map(len, label_scoring.label_tokens(labels, tokenizer))) + 1
        for _, batch in base_models.batches(prompts, tokenizer, size, "left"):
            out = model.generate(**batch.to(model.device), max_new_tokens=longest, do_sample=False)
            tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)

    def constrained(model, prompts, labels, size):
        eos = tokenizer.eos_token_id
        ids = [tokens + [eos] for tokens in label_scoring.label_tokens(labels, tokenizer)]
        for _, batch in base_models.batches(prompts, tokenizer, size, "left"):
            n = batch.input_ids.shape[1]

            def allowed(_, sequence, n=n):
                said = sequence[n:].tolist()
                return list({one[len(said)] for one in ids if one[: len(said)] == said != one}) or [eos]

            options = dict(max_new_tokens=max(map(len, ids)), do_sample=False, prefix_allowed_tokens_fn=allowed)
            out = model.generate(**batch.to(model.device), **options)
            tokenizer.batch_decode(out[:, n:], skip_special_tokens=True)

    models = {}
    for precision in ("nf4", "bfloat16"):
        with recorded("speed: load", precision=precision):
            profile = profiles.current(precision)
            causal = AutoModelForCausalLM.from_pretrained(
                base_models.fetch(), dtype=profile.dtype, quantization_config=profile.quantization, device_map=profile.device
            ).eval()
            causal.config.pad_token_id = causal.generation_config.pad_token_id = tokenizer.pad_token_id
            classifier, _ = embedding_head.load_classifier(base_models.DEFAULT, 5, precision=precision)
            models[precision] = causal, classifier
    for repeat in ("warm-up", 0, 1, 2):
        for precision, (causal, classifier) in models.items():
            for size, n in amounts.items():
                n = min(n, size) if repeat == "warm-up" else n
                for kind, labels in names.items():
                    for way in (head, scoring, constrained, free):
                        if left() < 2:
                            note("speed", stopped="no time left")
                            return
                        if way is head and kind != "one token":
                            continue
                        what = {"way": way.__name__, "labels": kind, "precision": precision, "batch_size": size, "repeat": repeat}
                        with recorded("speed", **what, documents=n) as found, torch.inference_mode():
                            began = synchronized()
                            way(classifier if way is head else causal, texts[:n], labels, size)
                            found["documents_per_second"] = n / (synchronized() - began)


def chapter(name: str) -> None:
    """The cells of a chapter one after the other, as a script."""
    import ast

    import IPython.display  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pandas  # noqa: F401
    import seaborn  # noqa: F401
    import statsmodels.api  # noqa: F401

    from helpers import bulk, compare, evaluation, instruction, own_data, plots, sources, tasks  # noqa: F401

    pretend()
    wait(given.state / "go")
    os.chdir(Path(__file__).resolve().parent.parent)
    cells = json.loads(Path(f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    scope = {"__name__": "__main__", "sys": sys, "os": os}

    def late(*_):
        raise TimeoutError("the cell took too long")

    signal.signal(signal.SIGALRM, late)
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code" or number == 1:
            continue
        source, began = "".join(cell["source"]), time.time()
        where = f"{name}[{number}]"
        if left() < 1:
            break
        signal.alarm(90)
        try:
            tree, end = ast.parse(source), None
            if isinstance(tree.body[-1], ast.Expr):
                end = ast.Expression(tree.body.pop().value)
            exec(compile(tree, where, "exec"), scope)
            if end is not None:
                value = eval(compile(end, where, "eval"), scope)
                print(f"   {where} gives {str(value)[:1200]}" if value is not None else "", flush=True)
            said = "ok"
        except BaseException as error:
            steps = traceback.extract_tb(error.__traceback__)
            steps = [each for each in steps if name in each.filename or "helpers" in each.filename]
            line = source.split("\n")[steps[0].lineno - 1].strip() if steps and name in steps[0].filename else ""
            places = [(each.filename.split("/")[-1], each.lineno) for each in steps]
            said = f"FAIL {type(error).__name__}: {str(error)[:400]} || line: {line} || at {places}"
        signal.alarm(0)
        print(f"@@ {where} {said} {time.time() - began:.1f} s", flush=True)
        note("chapter", cell=where, said=said, seconds=round(time.time() - began, 1))


def sweep_keys() -> list[dict]:
    """The comparison, the most telling first: seed by seed, learning rate by learning rate, all four ways side by side."""
    from helpers import runs

    asked = "Classify the news headline into {labels} and return the answer as the exact text label.\n\ntext: "
    named = dict(prefix=asked, suffix="\n\nlabel:", chat=True, name="instruction tuning + LoRA, labels named")
    ways = (
        {"EmbeddingHead": dict(probe_init=True)},
        {"InstructionTuned": {}},
        {"InstructionTuned": named},
        {"EmbeddingHead": dict(probe_init=False, name="embedding head + LoRA, random start")},
    )
    rates = (1e-3, 5e-4, 2e-3, 2e-4, 4e-3)
    found = []
    for per_class, epochs, seeds in ((32, (3, 8), (0, 1, 2)), (8, (8, 20), (0, 1, 2)), (64, (3, 8), (0, 1, 2))):
        options = {"per_class": per_class, "n_test": 500} if not TINY else {"per_class": 4, "n_validation": 20, "n_test": 20}
        for seed in seeds:
            for rate in rates:
                for n in epochs:
                    for way in ways:
                        (kind, settings), = way.items()
                        settings = settings | {"learning_rate": rate, "epochs": n} | ({"n_layers": 2} if TINY else {})
                        entry = {"tasks": [{"bbc-headlines": options}], "seeds": [seed], "validation": True,
                                 "approaches": [{kind: settings}]}
                        found += [key for key in runs.keys(entry) if key not in found]
    return found


def wait(path: Path) -> None:
    while not path.exists():
        time.sleep(0.2)


def worker(number: int) -> None:
    """Makes runs of the list until it is stopped; a run belongs to the process that makes its claim first."""
    from helpers import base_models, instruction, runs

    pretend(), quiet()
    name = f"sweep{number % 3}.jsonl"
    keys = sweep_keys()
    made = [record["key"] for file in range(3) for record in lines(f"sweep{file}.jsonl")]
    wait(given.state / "fetched")
    base_models.load_tokenizer = functools.cache(base_models.load_tokenizer)
    load = runs.load_task

    @functools.cache
    def loaded(key: str):
        return load(json.loads(key))

    runs.load_task = lambda key: loaded(json.dumps({name: key[name] for name in ("task", "options", "seed")}))
    runs.load_task(keys[0])
    wait(given.state / "go")
    failures = 0
    for index, key in enumerate(keys):
        if left() < (1 if TINY else 4) or failures > 5:
            break
        if key in made:
            continue
        try:
            os.close(os.open(given.claims / str(index), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        began = time.time()
        what = {"index": index, "worker": number, "run": runs._title(key)}
        try:
            record = runs.run(key)
            if instruction.SFTTrainer is instruction.LabelTokensTrainer and key["approach"] == "InstructionTuned":
                record["provenance"]["loss"] = "LabelTokensTrainer"
            write(name, record)
            chosen = {"accuracy": record["metrics"]["accuracy"], "training_seconds": record["cost"]["training_seconds"]}
            note("sweep", **what, **chosen, seconds=round(time.time() - began, 1))
        except Exception as error:
            failures += 1
            tail = traceback.format_exc().strip().split("\n")[-14:]
            note("sweep", **what, failed=f"{type(error).__name__}: {str(error)[:600]}", traceback=tail)
            if key["approach"] == "InstructionTuned" and failures == 1:
                instruction.SFTTrainer = instruction.LabelTokensTrainer  # the same loss, without the kernels of TRL
                (given.claims / str(index)).unlink()
            if "CUDA error" in str(error):
                break


# ------------------------------------------------------------------------------------------------------------ both


def start(stage: str, until: float, log: str = "log.txt") -> subprocess.Popen:
    command = [sys.executable, __file__, "--part", str(given.part), "--out", str(given.out), "--state", str(given.state)]
    command += ["--stage", stage, "--start", str(given.start), "--until", str(until)]
    with open(given.out / log, "a") as file:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def finish(processes: list[subprocess.Popen], until: float) -> None:
    """Wait until all have ended or it is time, then end them."""
    while time.time() < until and any(each.poll() is None for each in processes):
        time.sleep(0.2)
    for seconds, end in ((4, subprocess.Popen.terminate), (4, subprocess.Popen.kill)):
        running = [each for each in processes if each.poll() is None]
        for each in running:
            end(each)
        limit = time.time() + seconds
        while time.time() < limit and any(each.poll() is None for each in running):
            time.sleep(0.1)


def step(stage: str, until: float) -> int | None:
    until, began = min(until, given.until), time.time()
    process = start(stage, until)
    finish([process], until)
    note(f"{stage} ends", status=process.returncode, seconds=round(time.time() - began, 1))
    return process.returncode


def part_one() -> None:
    ended = {each["stage"] for each in lines("session.jsonl")}
    if "machine ends" not in ended:
        step("machine", time.time() + 60)
    if "smoke ends" not in ended:
        step("smoke", time.time() + (80 if not TINY else 200))
    for _ in range(5):
        if left() < 10 or step("bench", given.until - 2) == 0:
            break


def part_two() -> None:
    end = given.until - SPARE
    given.claims.mkdir(exist_ok=True)
    for claim in given.claims.iterdir():  # of a call that was stopped: what is recorded is left out by its key
        claim.unlink()
    for flag in ("go", "fetched"):
        (given.state / flag).unlink(missing_ok=True)
    crew = [start(f"worker:{number}", end) for number in range(WORKERS)]
    done = {each["cell"].split("[")[0] for each in lines("session.jsonl") if each["stage"] == "chapter"}
    crew += [start(f"chapter:{name}", end, "chapters.txt") for name in CHAPTERS if name not in done]
    try:
        timed = [each for each in lines("session.jsonl") if each["stage"] == "speed" and each.get("repeat") == 2]
        if not timed:
            step("speed", min(time.time() + (100 if not TINY else 200), end))
        (given.state / "fetched").touch()
        (given.state / "go").touch()
        note("sweep begins")
        finish(crew, end)
    finally:
        finish(crew, 0)
    note("sweep ends", statuses=[each.returncode for each in crew])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=(1, 2), required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder of what is recorded in this call")
    parser.add_argument("--state", type=Path, required=True, help="a folder that lasts from call to call")
    parser.add_argument("--seconds", type=float, default=300, help="after which all has ended, counted from --start")
    parser.add_argument("--start", type=float, default=time.time())
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.parse_args(namespace=given)
    given.until = given.until or given.start + given.seconds
    given.out, given.state = given.out.resolve(), given.state.resolve()
    given.claims = given.state / "claims"
    for folder in (given.out, given.state):
        folder.mkdir(parents=True, exist_ok=True)
    if given.stage:
        stage, _, which = given.stage.partition(":")
        if which:
            {"worker": lambda: worker(int(which)), "chapter": lambda: chapter(which)}[stage]()
        else:
            {"machine": machine, "smoke": smoke, "bench": bench, "speed": speed}[stage]()
        return
    note("begins", part=given.part, seconds=given.seconds)
    try:
        (part_one if given.part == 1 else part_two)()
    except Exception:
        note("failed", traceback=traceback.format_exc().strip().split("\n")[-14:])
    note("ends", part=given.part)
    print(*(Path(given.out / "session.jsonl").read_text().split("\n")[-60:]), sep="\n")


if __name__ == "__main__":
    main()
