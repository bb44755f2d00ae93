"""
Is anything ever lost, is anyone ever let in? Runs that are killed and go on, disks that fail, files that are damaged.

    python -m studies.faults             # all of it; tables and every finding in results/faults
    python -m studies.faults --quick     # a part, in about two minutes (make check)

runs    The training scripts, full and LoRA, every optimizer, dropout on, in float32 and float16, are started, hit at a random
        moment and resumed, again and again. Hit means: SIGKILL, SIGTERM or SIGINT after a random time; SIGKILL in the middle of a
        write, at an fsync or at a rename of a checkpoint; a full disk or an I/O error at one of these, a file-size limit, a
        folder that may not be written. After each, last.pt must load and metrics.jsonl hold whole lines; a run that got through
        must equal one that was never hit: weights, optimizer, generators, metrics, samples, bit for bit.
jobs    The same with torchrun and two processes, of which one is killed, or both are told to stop.
files   Every kind of file that we read, damaged by chance or made to harm (studies/fuzz.py).

Moments in time are drawn from --seed, but where the run then is depends on the machine, and torch's old format writes
addresses of memory; all else is the same in each call. SIGKILL takes the process, not the machine: what the system holds for
a file survives it, so this says nothing of a power cut. Against that stand the fsyncs, of file and folder, before and after a
rename; they are not tested here.
"""
import argparse
import collections
import ctypes
import errno
import functools
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import data
import files
import optim
import plots
import runs
import train_dpo
import train_reward
import train_sft
from files import InputError, fingerprint, read_checkpoint, write_atomically
from studies import fuzz

HERE = Path(__file__).parent.parent
COMMON = ["--steps", "7", "--micro-batch", "2", "--accumulate", "3", "--eval-every", "3", "--save-every", "2", "--log-every", "1",
          "--eval-samples", "4", "--warmup", "2", "--lr", "1e-3"]
LORA = ["--lora-rank", "2", "--lora-bias", "all"]
SAMPLES, DROPOUT = ["--eval-answers", "2"], ["--dropout", "0.1"]
MODES = {   # name: (script, its flags)
    "sft": (train_sft, [*SAMPLES, *DROPOUT, "--keep-every", "4"]),
    "sft, LoRA": (train_sft, [*SAMPLES, *DROPOUT, *LORA, "--lora-dropout", "0.1", "--init", "START"]),
    "reward": (train_reward, [*DROPOUT, "--init", "START"]),
    "reward, LoRA": (train_reward, [*DROPOUT, *LORA, "--lora-dropout", "0.1", "--init", "START"]),
    "dpo": (train_dpo, [*SAMPLES, "--init", "START"]),
    "dpo, LoRA": (train_dpo, [*SAMPLES, *LORA, "--init", "START"]),
    "cdpo": (train_dpo, [*SAMPLES, "--loss", "cdpo", "--init", "START"]),
    "cdpo, LoRA": (train_dpo, [*SAMPLES, *LORA, "--loss", "cdpo", "--init", "START"]),
}
HALF = ["--dtype", "float16", "--steps", "5"]   # the scaler starts so high that the first updates are skipped: PMA's periods then
#                                                 no longer begin with a step


def cases():
    """(name, script, flags): each optimizer in two modes, each mode with four optimizers; two in float16."""
    names, found = list(optim.OPTIMIZERS), []
    for shift in (0, 3):
        for i, optimizer in enumerate(names):
            mode = list(MODES)[(i + shift) % len(MODES)]
            found.append((f"{mode}, {optimizer}", MODES[mode][0], [*COMMON, *MODES[mode][1], "--optimizer", optimizer]))
    for mode, optimizer in (("sft", "adamw-pma"), ("dpo, LoRA", "adamw")):
        found.append((f"{mode}, {optimizer}, float16", MODES[mode][0],
                      [*COMMON, *MODES[mode][1], "--optimizer", optimizer, *HALF]))
    return found

# ----------------------------------------------------------------------------------------------------------------------
# faults

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
PLACES = ("write", "fsync", "rename", "renamed")   # in the middle of a write; before an fsync; before and after a rename
DISK = {"disk full at a write": ("write", errno.ENOSPC), "I/O error at an fsync": ("fsync", errno.EIO),
        "no right at a rename": ("rename", errno.EACCES), "file-size limit": None, "folder read-only": None}


class Hooked:
    """Stands between files.py and the system, in a forked process: counts writes to checkpoints, fsyncs and renames, and at the
    chosen one does the deed."""

    def __init__(self, place=None, number=0, deed=None):
        self.counts, self.place, self.number, self.deed = collections.Counter(), place, number, deed
        self.fsync, self.replace, files.open = os.fsync, os.replace, self.open
        os.fsync, os.replace = self.hooked_fsync, self.hooked_replace

    def at(self, place):
        self.counts[place] += 1
        if (place, self.counts[place]) == (self.place, self.number):
            self.deed()

    def open(self, path, mode="r", **options):
        file = open(path, mode, **options)
        return HookedFile(file, self) if str(path).endswith(".pt.part") else file

    def hooked_fsync(self, file):
        self.at("fsync")
        self.fsync(file)

    def hooked_replace(self, old, new):
        self.at("rename")
        self.replace(old, new)
        self.at("renamed")


class HookedFile:
    def __init__(self, file, hooked):
        self.file, self.hooked = file, hooked

    def write(self, chunk):
        view = memoryview(chunk).cast("B")
        done = self.file.write(view[:len(view) // 2])
        self.file.flush()
        self.hooked.at("write")
        return done + self.file.write(view[len(view) // 2:])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number):
    raise OSError(number, os.strerror(number))


def started(script, argv, folder, fault=None, number=None, delay=0.0):
    """The script as a program, in a fork. fault(): what is arranged before it begins."""
    def program():
        os.environ["HF_HOME"] = str(folder / "cache")
        sys.argv = [script.__file__, *argv]
        torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 40)
        hooked = fault() if fault else Hooked()
        runs.command_line(script.main, script.Config)
        return hooked.counts if isinstance(hooked, Hooked) else None
    return fuzz.forked(program, folder, number, delay)


def arrange(kind, draw, counts, out):
    """What makes this fault happen: keywords of started()."""
    if kind in SIGNALS:
        return {"number": SIGNALS[kind], "delay": draw.random() * counts["seconds"]}
    if kind.startswith("SIGKILL at "):
        place = kind.removeprefix("SIGKILL at ")
        at = draw.randint(1, max(1, counts[place] // 2))
        return {"fault": lambda: Hooked(place, at, kill_myself)}
    if DISK[kind]:
        place, number = DISK[kind]
        at = draw.randint(1, max(1, counts[place] // 2))
        return {"fault": lambda: Hooked(place, at, lambda: fail(number))}
    if kind == "file-size limit":
        most = draw.randint(1, counts["largest"] - 1)
        return {"fault": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))}

    def read_only():
        out.mkdir(exist_ok=True)
        out.chmod(0o555)
        if os.getuid() == 0:   # root may write everywhere, but for this right; version 3, this process; no capability at all
            ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    return {"fault": read_only}

# ----------------------------------------------------------------------------------------------------------------------
# what must hold

def state(out):
    """A finished run but for the time it took: (what last.pt and best.pt hold, the events, samples)."""
    timed = ("seconds", "tokens_per_second", "peak_memory")
    last = read_checkpoint(out / "last.pt")
    del last["at"]["seconds"], last["logs"]["metrics.jsonl"]
    events = [{key: value for key, value in json.loads(line).items() if key not in timed}
              for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = {path.name: fingerprint(read_checkpoint(path, ())) for path in sorted(out.glob("*.pt")) if path.name != "last.pt"}
    return {"last.pt": fingerprint(last), **weights, "events": fingerprint(events), "samples": (out / "samples.txt").read_text()}


def differs(one, other):
    keys = [key for key in one | other if one.get(key) != other.get(key)]
    return f"the resumed run differs in {', '.join(keys)}" if keys else None


def unsound(out):
    """What is wrong with the folder of a run that was hit, or None."""
    for path in out.glob("*.pt"):
        try:
            read_checkpoint(path, ())
        except InputError as e:
            return f"does not load: {e}"
    metrics = out / "metrics.jsonl"
    text = metrics.read_text() if metrics.is_file() else ""
    if text and not text.endswith("\n"):
        return "metrics.jsonl ends in the middle of a line"
    steps = [json.loads(line)["step"] for line in text.splitlines()]
    if steps != sorted(steps):
        return f"metrics.jsonl jumps: {steps}"
    return None


def misbehaved(kind, ended, out):
    """What is wrong with the way in which a run that was hit ended, or None."""
    lines = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    allowed = {"SIGKILL": (-9,), "SIGTERM": (130, -15), "SIGINT": (130,)}.get(kind, (2,) if kind in DISK else (-9,))
    if ended.status not in allowed:
        return f"status {ended.status}: {ended.said[-800:]}"
    if "Traceback" in ended.said or kind in DISK and len(lines) != 1:
        return f"no clear line: {ended.said[-800:]}"
    if "stopping after this step" in ended.said:
        return unsaved(out)
    return None


def unsaved(out):
    """A run that was told to stop has saved the step that it ended with; here every step is in metrics.jsonl."""
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    saved = read_checkpoint(out / "last.pt")["at"]["step"]
    return None if saved == last else f"stopped without a checkpoint: at step {last}, saved {saved}"


def case(folder, number, kinds, seed):
    """One way to train, hit by these faults one after the other. A list of what each led to."""
    name, script, flags = cases()[number]
    folder, draw, found = folder / f"case-{number}", random.Random(f"{seed} {number}"), []
    folder.mkdir()
    if (shared := folder.parent / "start.log/cache").is_dir():   # the data's tokens
        shutil.copytree(shared, folder / "cache")
    flags = [str(folder.parent / "start") if flag == "START" else flag for flag in flags]
    ended = started(script, [*flags, "--out", str(folder / "whole")], folder)
    assert ended.status == 0, (name, ended.said)
    whole = state(folder / "whole")
    caches = folder / "cache/nanopost/reference"
    shutil.rmtree(caches, ignore_errors=True)   # to be filled under fire
    counts = {**ended.value, "seconds": ended.seconds, "largest": (folder / "whole/last.pt").stat().st_size}
    out, waiting, tries = folder / "run", list(kinds), 0
    hits = []   # since the run was begun
    while waiting or hits:
        resumes = (out / "config.json").exists()
        argv = ["--out", str(out), "--resume"] if resumes else [*flags, "--out", str(out)]
        kind = waiting[0] if waiting and (resumes or waiting[0] != "folder read-only") else None
        if kind is None and waiting and not resumes and len(waiting) > 1:   # another one first
            waiting.append(waiting.pop(0))
            kind = waiting[0]
        ended = started(script, argv, folder, **(arrange(kind, draw, counts, out) if kind else {}))
        if kind == "folder read-only":
            out.chmod(0o755)
        if ended.status == 0:   # it got through
            different = differs(state(out), whole)
            for hit in hits:
                hit["wrong"] = hit["wrong"] or different
            shutil.rmtree(out)
            shutil.rmtree(caches, ignore_errors=True)
            found, hits, tries = found + hits, [], tries + 1
            assert tries < 5 * len(kinds), (name, "is never hit by", waiting)
        else:
            wrong = misbehaved(kind, ended, out) if kind else f"could not go on: {ended.said[-800:]}"
            hit = {"case": name, "kind": kind, "wrong": wrong or unsound(out)}
            hits.append(hit)
            waiting = waiting[1:] if kind else []
            if kind is None or hit["wrong"]:
                found, hits = found + hits, []
                shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder)
    return found


JOBS = ("SIGKILL of process 0", "SIGKILL of process 1", "SIGTERM of torchrun", "SIGINT of torchrun", "SIGTERM of process 0",
        "SIGTERM of process 1")
JOB = ["--steps", "120", "--micro-batch", "2", "--accumulate", "2", "--optimizer", "adamw-pma", "--dropout", "0.1",
       "--eval-every", "1000", "--save-every", "5", "--log-every", "1", "--eval-samples", "4", "--eval-answers", "2"]


def torchrun(out, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(out.parent / "start.log/cache")}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                             "train_sft.py", "--out", str(out), *flags], cwd=HERE, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment)


def job(folder, kind, whole, seed):
    """Two processes, hit once, resumed with two, and held against a run that was not hit."""
    out, draw, wrong = folder / kind.replace(" ", "-"), random.Random(f"{seed} {kind}"), None
    running = torchrun(out, *JOB)
    wanted = f"step {draw.randint(6, 20):>5}/"
    while wanted not in (line := running.stdout.readline()):
        assert line, running.stderr.read()
    number, _, whom = kind.partition(" of ")
    workers = [pid for _, pid in sorted(map(rank_of, children(running.pid)))]
    os.kill(running.pid if whom == "torchrun" else workers[int(whom[-1])], SIGNALS[number])
    _, said = running.communicate(timeout=120)
    if number == "SIGKILL" and "another process of this run has ended" not in said:
        wrong = f"no clear line: {said[:1500]}"
    if number != "SIGKILL":
        wrong = unsaved(out)
    wrong = wrong or unsound(out) or (None if running.returncode else "it ended before it was hit")
    again = torchrun(out, "--resume")
    _, said = again.communicate(timeout=120)
    if again.returncode:
        wrong = wrong or f"could not go on: {said[:1500]}"
    else:
        wrong = wrong or differs(state(out), whole)
    return {"case": "sft, adamw-pma, two processes", "kind": kind, "wrong": wrong}


def children(pid):
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def rank_of(pid):
    names = dict(entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry)
    return int(names["RANK"]), pid

# ----------------------------------------------------------------------------------------------------------------------
# all of it

def plan(quick):
    """[(case's number, its faults)], rounds of damage by chance, names of jobs."""
    placed, disk = [f"SIGKILL at {place}" for place in PLACES], list(DISK)
    if quick:
        numbers = (0, 3, 12, 22, 29, 32)
        hits = [(n, ["SIGKILL", list(SIGNALS)[1 + i % 2], placed[i % 4], disk[i % 5]]) for i, n in enumerate(numbers)]
        return hits, 12, JOBS[:1]
    return [(n, ["SIGKILL", placed[n % 4], "SIGTERM", placed[(n + 1) % 4], disk[n % 5], "SIGKILL", placed[(n + 2) % 4], "SIGINT"])
            for n in range(len(cases()))], 114, JOBS


def work(task):
    kind, arguments = task[0], task[1:]
    torch.set_num_threads(1)
    return kind, {"case": case, "chance": fuzz.chance, "crafted": fuzz.crafted}[kind](*arguments)


def begin(folder):
    """What all cases share: what a run would load late, a model to start from, and data that is there."""
    os.environ["HF_HOME"] = str(folder / "start.log/cache")
    torch.set_num_threads(1)   # torch's own threads would not survive a fork
    data.load_pairs("minihh")
    data.tokenizer(2048)
    optim.make("adamw", torch.nn.Linear(1, 1), 1e-3, None, 0.0)
    plots.canvas()[0].savefig(io.BytesIO())
    ended = started(train_sft, [*COMMON, *SAMPLES, "--out", str(folder / "start")], folder / "start.log")
    assert ended.status == 0, ended.said


def tables(found):
    """The findings as lines of two tables."""
    lines = ["| a run is hit by | times | ended in another way than it should | a file did not load | the resumed run differed |",
             "| --- | --- | --- | --- | --- |"]
    by = {kind: [] for kind in (*SIGNALS, *(f"SIGKILL at {place}" for place in PLACES), *DISK, *JOBS, None)}
    for hit in found["runs"] + found["jobs"]:
        by[hit["kind"]].append(hit["wrong"] or "")
    for kind, wrong in ((kind or "nothing", wrong) for kind, wrong in by.items() if wrong):
        load, differ = sum("not load" in w or "metrics" in w for w in wrong), sum("differs" in w for w in wrong)
        lines.append(f"| {kind} | {len(wrong)} | {sum(map(bool, wrong)) - load - differ} | {load} | {differ} |")
    lines += ["", "| file | changed | refused in one line | read as it was | read as other content | wrong |",
              "| --- | --- | --- | --- | --- | --- |"]
    by = {target: collections.Counter() for target in fuzz.READERS}
    for one in found["files"]:
        by[one["target"]]["wrong" if one["wrong"] else one["ended"]] += 1
    for target, counts in by.items():
        lines.append(f"| {target} | {counts.total()} | " + " | ".join(
            str(counts[key]) for key in ("refused", "as it was", "other content", "wrong")) + " |")
    return lines


def main(options):
    began, seed = time.time(), options.seed
    number_of_cases, rounds, jobs = plan(options.quick)
    found = {"seed": seed, "quick": options.quick, "runs": [], "jobs": [], "files": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "start.log").mkdir()
        begin(folder)
        ended = fuzz.forked(lambda: fuzz.prepare(folder / "files"), folder)
        assert ended.status == 0, ended.said
        tasks = [("case", folder, n, kinds, seed) for n, kinds in number_of_cases]
        tasks += [("crafted", folder / "files", what) for what in fuzz.CRAFTED]
        tasks += [("chance", folder / "files", target, k, seed) for k in range(rounds) for target in fuzz.READERS]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for i, (kind, result) in enumerate(pool.imap_unordered(work, tasks), 1):
                found["runs" if kind == "case" else "files"] += result if kind == "case" else [result]
                for one in result if kind == "case" else [result]:
                    if one["wrong"]:
                        print(f"WRONG {one}", flush=True)
                if kind == "case" or i % 200 == 0:
                    print(f"{runs.clock(time.time() - began)} {i} of {len(tasks)}: {len(found['runs'])} faults, "
                          f"{len(found['files'])} files", flush=True)
        whole = torchrun(folder / "whole", *JOB)
        assert not whole.wait(timeout=120), whole.stderr.read()
        for kind in jobs:
            found["jobs"].append(job(folder, kind, state(folder / "whole"), seed))
            print(f"{runs.clock(time.time() - began)} two processes, {kind}: {found['jobs'][-1]['wrong'] or 'went on'}",
                  flush=True)
    report(found, options, began)


def report(found, options, began):
    hits, changed = found["runs"] + found["jobs"], found["files"]
    wrong = [one for one in hits + changed if one["wrong"]]
    kills = [hit for hit in hits if "SIG" in (hit["kind"] or "")]
    placed = [hit for hit in hits if " at " in (hit["kind"] or "") and "SIGKILL" in hit["kind"]]
    summary = (f"{len(kills)} kills, {len(placed)} of them at a write, fsync or rename of a checkpoint, and "
               f"{len(hits) - len(kills)} failing disks; {len(changed):,} files, at most "
               f"{max(one['more memory'] for one in changed) / 1e6:.0f} MB to read one; {len(wrong)} went wrong")
    print("\n".join(["", *tables(found), "", f"{summary}. {runs.clock(time.time() - began)}"]))
    if not options.quick:
        out = HERE / options.results
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "tables.md", "\n".join([
            f"`python -m studies.faults --seed {options.seed}`: {summary}.", "", *tables(found), ""]).encode())
        counts = collections.Counter(json.dumps([hit["case"], hit["kind"]]) for hit in hits)
        write_atomically(out / "faults.json", json.dumps({
            "seed": options.seed, "kills": len(kills), "placed": len(placed), "disk": len(hits) - len(kills),
            "files": len(changed), "most_memory": max(one["more memory"] for one in changed), "wrong": wrong,
            "faults": [[*json.loads(key), n] for key, n in counts.items()],
            "crafted": {one["what"]: one["ended"] for one in changed if one["what"] in fuzz.CRAFTED}}, indent=1).encode())
    if wrong:
        raise InputError(f"{len(wrong)} of {len(hits) + len(changed)} went wrong")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part of it; keeps nothing")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and of the damage")
    parser.add_argument("--results", default="results/faults", help="folder of the tables")
    given = parser.parse_args()
    runs.one_line(lambda: main(given))
