"""
Where the time of a training step goes, by operator: torch's profiler around the steps that studies.bench times.

    python -m studies.operators --data harmless-base-test.jsonl.gz --out results/bench/operators.json
"""
import argparse
import json
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

import model as gpt
import runs
from files import InputError
from studies import rivals

KINDS = ("sft", "dpo", "cdpo")
GROUPS = {   # how the names of their operators begin
    "matrix products": ("aten::mm", "aten::addmm", "mkldnn::_linear"),
    "attention": ("aten::_scaled_dot_product",),
    "GELU": ("aten::gelu",),
    "AdamW and clipping": ("aten::_fused_adamw", "aten::linalg_vector_norm", "aten::_foreach", "Optimizer"),
    "gathers and embeddings": ("aten::embedding", "aten::index", "aten::cat", "aten::gather"),
    "log-softmax": ("aten::_log_softmax", "aten::exp_", "aten::sigmoid", "aten::scatter"),
    "LayerNorm": ("aten::native_layer_norm",),
    "all else": ("",),
}


def shares(times):
    """{operator: time} -> {group: its share of the whole}; an operator counts for the first group that its name fits."""
    found = dict.fromkeys(GROUPS, 0.0)
    for name, time in times.items():
        found[next(group for group, starts in GROUPS.items() if name.startswith(starts))] += time / sum(times.values())
    return found


def profiled(work, kind):
    """{operator: microseconds} of a kind of step, on the CPU, in a second pass over the work."""
    steps, _ = rivals.ours(work, kind)
    steps()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        steps()
    return {event.key: event.self_cpu_time_total for event in found.key_averages()}


def table(rows):
    return "\n".join([f"| | {' | '.join(GROUPS)} |", "| --- |" + " --- |" * len(GROUPS),
                      *(f"| {kind.upper()} | {' | '.join(f'{100 * share[group]:.1f}' for group in GROUPS)} |"
                        for kind, share in rows.items())])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=gpt.SIZES, default="gpt2")
    parser.add_argument("--data", default="hh-rlhf/harmless-base", help="as for a script")
    parser.add_argument("--out", help="JSON file for the rows")
    cfg = parser.parse_args(argv)
    if cfg.out and (Path(cfg.out).is_dir() or not Path(cfg.out).parent.is_dir()):   # better now than after the work
        raise InputError(f"--out: expected a file's name in a folder that exists, found {cfg.out}")
    work = rivals.work(cfg.data, cfg.model, "cpu").shuffled()
    rows = {kind: shares(profiled(work, kind)) for kind in KINDS}
    print(table(rows))
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    runs.one_line(main)
