"""
What the studies share: runs that are made once, two at a time, kept in one file, and go on where they were; and the rule that
picks a learning rate.
"""
import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import plots
from files import InputError, write_atomically
from runs import one_line

HERE = Path(__file__).parent.parent


def rate(power):
    """The lattice of all learning rates, with three digits."""
    return float(f"{3e-3 * 1.5 ** power:.3g}")


def search(loss_at, middle):
    """{power: loss} of the rates tried, or None where the time was up. loss_at(power): a run's loss, infinite where it diverged,
    or None where there is no time for it.

    Three rates 2.25 apart around the middle, up to two more while the best of them is the outermost, then the two next to the
    best, 1.5 away, and once more where that made another the best.
    """
    tried = {}

    def at(power):
        if power not in tried:
            loss = loss_at(power)
            if loss is None:
                raise TimeoutError
            tried[power] = loss

    try:
        for power in (middle - 2, middle, middle + 2):
            at(power)
        for stride in (2, 2, 1, 1):
            best = min(tried, key=tried.get)
            if stride == 1:
                at(best - 1)
                at(best + 1)
            elif best in (min(tried), max(tried)):
                at(best - stride if best == min(tried) else best + stride)
    except TimeoutError:
        return None
    return dict(sorted(tried.items()))


def rates_table(grids):
    """{name: {rate: loss}} as lines of a table."""
    lines = ["| | rate: loss |", "| --- | --- |"]
    for name, grid in grids.items():
        best = min(grid, key=grid.get)
        tried = [f"{lr:g}: {loss:.4f}" if loss < math.inf else f"{lr:g}: diverges" for lr, loss in sorted(grid.items())]
        tried = [f"**{text}**" if lr == best else text for lr, text in zip(sorted(grid), tried)]
        edge = " (at the edge of what was tried)" if best in (min(grid), max(grid)) else ""
        lines.append(f"| {name} | {', '.join(tried)}{edge} |")
    return lines


def band(steps, losses, bins=100):
    """[[last step, mean, lowest, highest], ...] of at most so many stretches of a training loss."""
    size = math.ceil(len(steps) / bins)
    cut = [(steps[i:i + size], losses[i:i + size]) for i in range(0, len(steps), size)]
    return [[s[-1], statistics.fmean(x), min(x), max(x)] for s, x in cut]


def spikes(losses, reach=25):
    """How rough the second half of a training loss is, where it falls least: {"share": of steps whose loss is half as high again
    as the median of the `reach` steps on either side, "roughness": sqrt(2/3) times the root mean square of a step's distance
    from the mean of its two neighbours, in nats: of noise its standard deviation, of a straight line 0; None of fewer than 3}."""
    losses = losses[len(losses) // 2:]
    middle = [statistics.median(losses[max(0, i - reach):i + reach + 1]) for i in range(len(losses))]
    apart = [b - (a + c) / 2 for a, b, c in zip(losses, losses[1:], losses[2:])]
    return {"share": statistics.fmean(x > 1.5 * m for x, m in zip(losses, middle)),
            "roughness": math.sqrt(statistics.fmean(x * x for x in apart) / 1.5) if apart else None}


def distance(before, events):
    """How far apart the losses of two lists of events are at most, relative to the first; infinite where steps or samples are
    not the same."""
    places = [[{key: e.get(key) for key in ("step", "samples")} for e in of] for of in (before, events)]
    pairs = [(a[key], b.get(key, math.inf)) for a, b in zip(before, events) for key in a if key.endswith("_loss")]
    return math.inf if places[0] != places[1] else max((abs(b - a) / a for a, b in pairs), default=0.0)


class Lab:
    """Starts runs until it is told to stop, and keeps what they found, {name: {"command", "flags", "events", ...}}, a line each
    of runs.jsonl in the results' folder. The run `name` lies in folder(name), on one thread.

    runs: where the runs lie; keys, flags: what is kept of an event and of a run's flags. Of a run whose name holds `brief` only
    the last evaluation is kept. Of one with --log-every 1, its training loss, step by step, is kept as a band (thinned).
    """

    def __init__(self, results, runs, keys, flags, brief=None):
        self.file, self.runs, self.keys, self.flags, self.brief = HERE / results / "runs.jsonl", Path(runs), keys, flags, brief
        self.stop, self.children, self.lock, self.found = threading.Event(), set(), threading.Lock(), {}
        lines = self.file.read_text().splitlines(True) if self.file.exists() else []
        for line in lines:
            if line.endswith("\n"):   # else a crash cut it off, and the run is made again
                run = json.loads(line)
                self.found[run.pop("name")] = run
        self.written = set(self.found)   # the names in the file

    def folder(self, name):
        return HERE / self.runs / name

    def run(self, name, script, *flags):
        """What the run `name` found: made now if it is not there. None where we are to stop before it is."""
        command = [script, *map(str, flags)]
        if name in self.found:
            if self.found[name]["command"] != command:
                raise InputError(f"{self.file} holds {name} made by {self.found[name]['command']}, which is not {command}: "
                                 "give another --results")
            return self.found[name]
        folder = self.folder(name)
        how = "--resume" if (folder / "last.pt").exists() else "--overwrite"
        with self.lock:
            if self.stop.is_set():
                return None
            child = subprocess.Popen([sys.executable, *command, "--out", f"{self.runs}/{name}", how], cwd=HERE, text=True,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                                     env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.children.add(child)
        if self.stop.is_set():   # since we looked
            child.send_signal(signal.SIGTERM)
        message = child.communicate()[1].strip()
        with self.lock:
            self.children.discard(child)
        if child.returncode == 0 or child.returncode == 2 and "try a smaller --lr" in message:
            self.keep(name, {"command": command, **self.summary(folder, self.brief and self.brief in name),
                             **({"diverged": message} if child.returncode else {})})
            (folder / "last.pt").unlink()
        elif child.returncode == 2 and ("cannot be resumed" in message or "another version" in message):   # of an older study
            (folder / "last.pt").unlink()
            return self.run(name, script, *flags)
        elif not self.stop.is_set():
            raise InputError(f"{' '.join(command)}: {message}")
        return self.found.get(name)

    def weights(self, name, script, *flags):
        """As run(), where best.pt is needed: made again where that is gone. It must then find what it did; on another CPU, which
        rounds otherwise, nearly: losses within 10 %, and what was kept stays."""
        before = None if (self.folder(name) / "best.pt").exists() else self.found.pop(name, None)
        run = self.run(name, script, *flags)
        if before:
            self.found[name] = before
        if run and before:
            apart = distance(before["events"], run["events"])
            if apart > 0.1:
                raise InputError(f"{name} is not what it was when {self.file} was begun: give another --results")
            if apart:
                print(f"{name}: losses up to {apart:.1%} from those kept; another CPU or torch rounds otherwise", flush=True)
        return run and (before or run)

    def judge(self, name, models, judge):
        """The folder in which eval_reward.py leaves what this judge says of these models, on one thread. Not broken off."""
        out = f"{self.runs}/{name}"
        done = subprocess.run([sys.executable, "eval_reward.py", "--models", ",".join(models), "--judge", judge, "--out", out,
                               "--show", "0"], cwd=HERE, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise InputError(f"{name}: {done.stderr.strip()}")
        return HERE / out

    def summary(self, folder, brief=False):
        """Of a run's folder: what tells it apart, its evaluations and its probes, to 5 digits."""
        def short(value):
            if isinstance(value, (list, dict)):
                return [short(x) for x in value] if isinstance(value, list) else {key: short(x) for key, x in value.items()}
            return float(f"{value:.5g}") if isinstance(value, float) else value
        config, events = plots.read(folder)
        kept = [{key: short(e[key]) for key in self.keys if key in e} for e in events
                if "probe_loss" in e or any(key.startswith("val_") for key in e)]
        found = {"flags": {key: config["flags"][key] for key in self.flags}, "commit": config["commit"],
                 "events": kept[-1:] if brief else kept}
        if config["flags"]["log_every"] == 1 and not brief:
            steps = [(e["step"], e["train_loss"]) for e in events if "train_loss" in e]
            found |= {"band": short(band(*zip(*steps))), "spikes": short(spikes([loss for _, loss in steps]))} if steps else {}
        return found

    def keep(self, name, run):
        """What a run found, in the file, too, if nothing of that name is there."""
        with self.lock:
            self.found[name] = run
            self.file.parent.mkdir(parents=True, exist_ok=True)
            text = self.file.read_text() if self.file.exists() else ""
            if text and not text.endswith("\n"):
                write_atomically(self.file, text[:text.rfind("\n") + 1].encode())
            if name not in self.written:
                self.written.add(name)
                with open(self.file, "a") as f:
                    f.write(json.dumps({"name": name, **run}, separators=(",", ":")) + "\n")
        what = run.get("diverged") or (f"{run['events'][-1]['seconds']:.0f} s of training" if "events" in run else "judged")
        print(f"{time.strftime('%H:%M:%S')} {name}: {what}", flush=True)

    def interrupt(self, *_):
        """Stop: every run writes a checkpoint, from which the next call of the study goes on."""
        self.stop.set()
        for child in list(self.children):
            child.send_signal(signal.SIGTERM)

    def map(self, function, jobs):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda job: function(*job), jobs))


def command_line(doc, results, lab, work, report):
    """A study as a program. lab(results) -> a Lab; work(lab) does what is not there yet; report(lab) writes what there is."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=24 * 60, help="stop after this time; the next call goes on")
    parser.add_argument("--report", action="store_true", help="only write the tables and pictures")
    parser.add_argument("--results", default=results, help="folder of the results")
    options = parser.parse_args()

    def study():
        if not options.minutes > 0:
            raise InputError(f"--minutes: expected a number above 0, found {options.minutes}")
        found = lab(options.results)
        if not options.report:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
                signal.signal(number, found.interrupt)
            signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
            work(found)
        report(found)
    one_line(study)
