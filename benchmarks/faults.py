"""Kills at random moments, full disks and bad inputs: `benchmarks/reliability.md`.

    python benchmarks/faults.py --kills 200 --bad_inputs 500

Each run is stopped again and again, resumed until it ends, and compared with one that was never stopped. What was
done is in `runs/faults`, one line for each fault, and is not done again by the same command.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tqdm import tqdm  # noqa: E402

from benchmarks.stoppable_run import KEYBOARD_INTERRUPT, STEPS, Run  # noqa: E402
from diffusers_rcfd.trainers.checkpoints import find_checkpoint_damage, find_checkpoints  # noqa: E402
from diffusers_rcfd.trainers.made_files import MADE_FILE, read_made  # noqa: E402
from diffusers_rcfd.trainers.parts import verify  # noqa: E402
from tests import invalid_options  # noqa: E402

TRAINERS, DATA, PROCESSES = ("base", "classifier", "ladder"), ("shuffled", "streamed"), (1, 2)
JOBS = [(trainer, processes, data) for data in DATA for processes in PROCESSES for trainer in TRAINERS]
JOBS += [("sfd", processes, "none") for processes in PROCESSES]
SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGTERM, signal.SIGINT)
MOMENTS = ("in a step",) * 4 + ("in a checkpoint",) * 4 + ("at the end of a stage",) * 2 + ("at the start",)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--bad_inputs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks/reliability.md")
    args = parser.parse_args()
    folder = ROOT / f"runs/faults/seed-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    tqdm.monitor_interval = 0  # no thread here: every run is forked from this process,
    tqdm.set_lock(threading.RLock())  # which a bar's lock between processes, held by one that is killed, would stop
    references = {job: reference(job, folder) for job in tqdm(JOBS, desc="never stopped", unit="run")}
    twice, flips = start_twice(folder, references), flip_bits(folder, args.seed)
    records = stop_runs(args, folder, references)
    inputs = bad_inputs(args.bad_inputs, args.seed, folder / "bad-inputs")
    args.report.write_text(report(args, records, inputs, twice, flips), encoding="utf-8")
    print(args.report.read_text(encoding="utf-8"))


# --- stopping runs --------------------------------------------------------------------------------------------------


def stop_runs(args, folder, references):
    """Stop and resume runs until there are as many kills as asked for; one record for each fault."""
    lines = folder / "faults.jsonl"
    records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
    done = {record["run"] for record in records}
    bar = tqdm(total=args.kills, initial=min(args.kills, count_kills(records)), desc="kills", unit="kill")
    number = 0
    while count_kills(records) < args.kills or number < len(JOBS):
        if number not in done:
            before = count_kills(records)
            records += faults_of(number, args.seed, references, folder)
            with open(lines, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records if record["run"] == number)
            bar.update(count_kills(records) - before)
        number += 1
    bar.close()
    return [record for record in records if "missed" not in record]


def count_kills(records):
    return sum("signal" in record and "missed" not in record for record in records)


def reference(job, folder):
    """A run that is never stopped: what it leaves, and how long its parts take."""
    output_dir = folder / "-".join(map(str, ("whole", *job)))
    shutil.rmtree(output_dir, ignore_errors=True)
    run = Run(job, output_dir)
    codes = run.wait()
    if any(codes):
        raise RuntimeError(f"A run of {job} that nobody stopped left with {codes}: {output_dir.with_suffix('.log')}")

    def duration(first, last, skip=0):
        starts, ends = ([when for when, name, _ in run.told if name == event] for event in (first, last))
        return statistics.median(end - start for start, end in zip(starts, ends[skip:], strict=False))

    times = {
        "at the start": next(when for when, name, _ in run.told if name == "step"),
        "in a step": duration("step", "step", skip=1),
        "in a checkpoint": duration("writing", "written"),
        "at the end of a stage": duration("ending", "ended"),
    }
    return {"left": what_is_left(output_dir), "seconds": times}


def faults_of(number, seed, references, folder):
    """One run with its faults, resumed until it ends. Every sixth meets a full disk, the others one to four kills."""
    rng, job = random.Random(f"{seed}-{number}"), JOBS[number % len(JOBS)]
    output_dir, whole = folder / f"run-{number}", references[job]
    for old in (output_dir, output_dir.with_suffix(".log")):
        shutil.rmtree(old, ignore_errors=True)
        with suppress(OSError):
            old.unlink()
    records, kills = [], rng.randint(1, 4)
    if (number // len(JOBS)) % 6 == 0:
        records.append(fill_disk(rng, job, output_dir, whole))
    elif (number // len(JOBS)) % 6 == 1:
        kills = 4
    while len(records) < kills and not (records and "missed" in records[-1]):
        records.append(kill(rng, job, output_dir, whole, kills - len(records)))
    run = Run(job, output_dir)
    codes = run.wait()
    resumed = not any(codes)
    differences = (
        compare(what_is_left(output_dir), whole["left"]) if resumed else [f"left with {codes}: {run.error()}"]
    )
    for i, record in enumerate(records):
        went_on = records[i + 1].get("went_on", True) if i + 1 < len(records) else resumed
        record |= {"run": number, "job": job, "resumed": went_on, "identical": not differences,
                   "differences": differences[:5]}  # fmt: skip
    if all(record["resumed"] and record["identical"] and not record["lost"] for record in records):
        shutil.rmtree(output_dir)
        output_dir.with_suffix(".log").unlink()
    return records


def kill(rng, job, output_dir, whole, kills_left):
    """Start or resume a run and stop it at a random moment."""
    moment, number = rng.choice(MOMENTS), rng.choice(SIGNALS)
    reached = newest(output_dir)
    step = reached + rng.randint(1, max(1, (STEPS - reached) // kills_left))
    run = Run(job, output_dir)
    came = {
        "at the start": lambda: True,
        "in a step": lambda: wait_for_step(run, min(step, STEPS - 1)),
        "in a checkpoint": lambda: run.wait_for("writing", rng.randint(1, 2)),
        "at the end of a stage": lambda: run.wait_for("ending"),
    }[moment]()
    time.sleep(rng.uniform(0, whole["seconds"][moment]))
    targets = run.pids if job[1] == 1 or rng.random() < 0.5 else [rng.choice(run.pids)]
    run.stop(number, targets)
    codes = run.wait()
    record = {"signal": signal.Signals(number).name, "moment": moment, "processes_hit": len(targets), "codes": codes,
              "step": run.last("step"), "lost": lost(run, codes, output_dir, whole), "went_on": True}  # fmt: skip
    if not came or not any(codes):
        record["missed"] = True
    if 1 in codes and not any(code in (-9, -15, 130, 143, KEYBOARD_INTERRUPT) for code in codes):
        record["went_on"] = False  # an error of its own, before or in place of the signal
        record["lost"] = [*record["lost"], run.error()]
    return record


def wait_for_step(run, step):
    while run.last("step") < step:
        if not run.wait_for("step", sum(name == "step" for _, name, _ in run.told) + 1):
            return False
    return True


def fill_disk(rng, job, output_dir, whole):
    """Start a run and let the disk be full at a random place of a random checkpoint, or of the save of a result."""
    moment = rng.choice(("in a checkpoint", "in the save of a pipeline"))
    sizes = [len(content) for name, content in whole["left"].items() if name.endswith(".safetensors")]
    disk = {"moment": moment, "size": rng.randrange(max(sizes)), "step": rng.randint(1, STEPS - 5)}
    run = Run(job, output_dir, disk)
    codes = run.wait()
    named = run.error().startswith("OSError")
    problems = [] if any(codes) and named else [f"no error that names the disk: {codes} {run.error()}"]
    return {"disk": disk["size"], "moment": moment, "codes": codes, "error": run.error(), "went_on": True,
            "lost": problems + lost(run, codes, output_dir, whole)}  # fmt: skip


# --- two starts at once, flipped bits -------------------------------------------------------------------------------


def start_twice(folder, references):
    """For each job: a second run is started in the folder of one in its middle; what went wrong, by job."""
    problems = {}
    for job in tqdm(JOBS, desc="two starts", unit="run"):
        output_dir = folder / "-".join(map(str, ("twice", *job)))
        shutil.rmtree(output_dir, ignore_errors=True)
        first = Run(job, output_dir)
        wait_for_step(first, STEPS // 2)
        second = Run(job, output_dir)
        refused = all(second.wait()) and f"is in use by process {first.pids[0]}" in second.error()
        went_on = not any(first.wait())
        differences = compare(what_is_left(output_dir), references[job]["left"]) if went_on else ["did not end"]
        problems[job] = differences + ([] if refused else [f"the second was not refused: {second.error()}"])
    return problems


def flip_bits(folder, seed):
    """For each job: one bit at a random place of each file of a finished run; the names of files not found by it."""
    rng, missed = random.Random(seed), {}
    for job in JOBS:
        output_dir = folder / "-".join(map(str, ("whole", *job)))
        paths = sorted(path for path in output_dir.rglob("*") if path.is_file())
        missed[job] = (len(paths), [str(path.relative_to(output_dir)) for path in paths if not is_found(path, rng)])
    return missed


def is_found(path, rng):
    """Whether a flipped bit in a file is found by `verify`, which names the file."""
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged)
    faults = verify(path.parent if path.parent.name.startswith("checkpoint-") else run_folder_of(path))
    path.write_bytes(content)
    return any(path.name in fault for fault in faults)


def run_folder_of(path):
    return next(parent for parent in path.parents if (parent / MADE_FILE).is_file())


# --- what is left ---------------------------------------------------------------------------------------------------


def whole_checkpoints(output_dir):
    """The steps of those checkpoints each of whose files is what was written."""
    whole = [checkpoint for checkpoint in find_checkpoints(output_dir) if find_checkpoint_damage(checkpoint) is None]
    return [int(checkpoint.name.removeprefix("checkpoint-")) for checkpoint in whole]


def newest(output_dir):
    """The step of the newest whole checkpoint; 0 where there is none."""
    return max(whole_checkpoints(output_dir), default=0)


def lost(run, codes, output_dir, whole):
    """What a stopped run should have kept and has not: its checkpoints, and each line of metrics up to the newest."""
    problems, kept = [], newest(output_dir)
    if kept < run.last("written"):
        problems.append(f"checkpoint {run.last('written')} was written, {kept} is the newest")
    if (130 in codes or 143 in codes) and kept < run.last("step") + 1:
        problems.append(f"left with {codes} in step {run.last('step') + 1}, {kept} is the newest checkpoint")
    expected = [line for line in whole["left"]["metrics.jsonl"].decode().splitlines(True) if step_of(line) <= kept]
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.is_file() else []
    if lines[: len(expected)] != expected and kept < STEPS:
        problems.append(f"metrics up to checkpoint {kept} are not those of the run never stopped")
    return problems


def step_of(line):
    return json.loads(line)["global_step"]


def what_is_left(output_dir):
    """Every file of a finished run by its name; of its whole checkpoints, which hold how long it took, the number."""
    steps = whole_checkpoints(output_dir)
    records = ("run.json", MADE_FILE)  # the time, and the steps of the checkpoints
    paths = [path for path in output_dir.rglob("*") if path.is_file() and path.name not in records]
    names = {str(path.relative_to(output_dir)): path for path in paths}
    files = {name: path.read_bytes() for name, path in names.items()
             if not any(name.startswith(f"checkpoint-{step}/") for step in steps)}  # fmt: skip
    made = read_made(output_dir)
    listed = {name: listed for name, listed in made["files"].items() if name not in records}
    return files | {"whole checkpoints": len(steps), "listed files": listed, "listed models": made["models"]}


def compare(left, whole):
    """The names of files that one of two runs lacks, or that differ."""
    return sorted(name for name in left.keys() | whole.keys() if left.get(name) != whole.get(name))


# --- bad inputs -----------------------------------------------------------------------------------------------------


def bad_inputs(count, seed, folder):
    """Build configs and schedulers with one invalid value each: {(class, field): [None or what went wrong]}."""
    import hypothesis

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    outcomes, here = defaultdict(list), os.getcwd()
    os.chdir(folder)

    def one(cls, field):
        @hypothesis.seed(seed)
        @hypothesis.settings(max_examples=each, database=None, deadline=None, derandomize=False)
        @hypothesis.given(invalid_options.invalid_value(cls, field))
        def build_one(value):
            problem = invalid_options.fault_of_error(cls, field, value)
            written = [str(path) for path in Path().iterdir()]
            outcomes[cls.__name__, field].append(problem or (f"wrote {written}" if written else None))

        build_one()

    fields = invalid_options.all_fields()
    each = -(-count // len(fields))
    for cls, field in tqdm(fields, desc="bad inputs", unit="field"):
        one(cls, field)
    os.chdir(here)
    return outcomes


# --- the report -----------------------------------------------------------------------------------------------------


def share(records, good):
    number = sum(map(bool, map(good, records)))
    return f"{number}" if number == len(records) else f"**{number} of {len(records)}**"


def table(records, heads, keys):
    """Rows of the records that have the same keys."""
    lines = [f"| {' | '.join(heads)} | faults | resumed | bit-identical | nothing lost | |",
             f"|{'---|' * len(heads)}---:|---:|---:|---:|---:|"]  # fmt: skip
    groups = defaultdict(list)
    for record in records:
        groups[tuple(map(str, keys(record)))].append(record)
    for key, group in [*sorted(groups.items()), (("all", *[""] * (len(heads) - 1)), records)]:
        good = sum(r["resumed"] and r["identical"] and not r["lost"] for r in group)
        counts = (share(group, lambda r: r["resumed"]), share(group, lambda r: r["identical"]),
                  share(group, lambda r: not r["lost"]))  # fmt: skip
        lines.append(f"| {' | '.join(key)} | {len(group)} | {' | '.join(counts)} | {100 * good / len(group):.4g} % |")
    return "\n".join(lines)


def report(args, records, inputs, twice, flips):
    kills, disks = [r for r in records if "signal" in r], [r for r in records if "disk" in r]
    bad = [f"- run {r['run']} {r['job']}, {r.get('signal', 'full disk')} {r['moment']}: "
           f"{'; '.join(map(str, r['lost'] + r['differences'])) or 'did not resume'}"
           for r in records if r["lost"] or not r["resumed"] or not r["identical"]]  # fmt: skip
    classes = defaultdict(list)
    for (cls, _), problems in inputs.items():
        classes[cls] += problems
    fields = {name: len({field for cls, field in inputs if cls == name}) for name in classes}
    rows = [(name, fields[name], problems) for name, problems in classes.items()]
    rows.append(("all", len(inputs), [problem for problems in classes.values() for problem in problems]))
    rows = [f"| {name} | {number} | {len(problems)} | {share(problems, lambda p: p is None)} | "
            f"{100 * problems.count(None) / len(problems):.4g} % |" for name, number, problems in rows]  # fmt: skip
    bad += sorted({f"- {cls}, `{field}`: {p}" for (cls, field), problems in inputs.items() for p in problems if p})
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "accelerate", "hypothesis"))
    errors = sorted({r["error"].split(":")[0] for r in disks})
    bad += [f"- two starts of {job}: {'; '.join(problems)}" for job, problems in twice.items() if problems]
    bad += [f"- {job}, not found by a flipped bit: {', '.join(names)}" for job, (_, names) in flips.items() if names]
    newline = "\n"
    return f"""# Reliability: kills, full disks and bad inputs

Written by `python benchmarks/faults.py --kills {args.kills} --bad_inputs {args.bad_inputs} --seed {args.seed}` on
{date.today()}, on CPUs, several processes by gloo. {packages}.

## Kills

{len(kills)} kills of {len({r["run"] for r in kills})} runs of {STEPS} steps: a base model, a classifier, a ladder of
three students (pd, cfd, rcfd) and a student by SFD of two step counts, which needs no data (both with two accumulated
batches a step), all with a moving average, a cosine schedule with warm-up, sample grids, a line of metrics every 3
steps and a checkpoint every 4, two kept. A run is killed up to four times, wherever it is, and resumed with
`resume_from_checkpoint="latest"` until it ends; of two processes one is hit or both. The moment is drawn at random
within its kind.

*Resumed*: the next start went on. *Bit-identical*: in the end every file that the run left (weights, configs, metrics,
sample images) is that of a run never stopped, none is more, and as many whole checkpoints are there. *Nothing
lost*: after the kill the newest checkpoint that had been written is whole by its checksums, each line of metrics
up to it is there, and SIGTERM and SIGINT, once training has begun, leave a checkpoint of the step they came in.

{table(kills, ("trainer", "processes", "data"), lambda r: r["job"])}

{table(kills, ("signal", "moment"), lambda r: (r["signal"], r["moment"]))}

## Full disks

A limit on the size of files (`RLIMIT_FSIZE`), at a random size and step, in place of a disk that is full in the middle
of a checkpoint or of the save of a result. The run ends with an error ({", ".join(errors)}), *nothing lost* as above;
with the limit gone it is resumed (in some runs killed as well) and compared as above.

{table(disks, ("moment", "trainer", "processes"), lambda r: (r["moment"], r["job"][0], r["job"][1]))}

## Two starts, flipped bits

In the middle of a run a second one is started in its folder: {sum(not problems for problems in twice.values())} of
{len(twice)} second ones were refused with the number of the process that holds it, while the first ended as one that
was alone. One bit at a random place of each file of a finished run: `verify` found
{sum(number - len(names) for number, names in flips.values())} of {sum(number for number, _ in flips.values())}, by the
name of the file.

## Bad inputs

Hypothesis draws one invalid value for one field at a time. *Clear error*: a `ValueError`, `TypeError` or
`FileNotFoundError` that names the field, before any file was written.

| class | fields | inputs | clear error | |
|---|---:|---:|---:|---:|
{newline.join(rows)}

## Rows below 100 %

{newline.join(bad) or "None."}
"""


if __name__ == "__main__":
    main()
