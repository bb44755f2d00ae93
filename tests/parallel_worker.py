"""
Several small runs one after the other, in one process of one or of several: what test_parallel.py compares.

    python tests/parallel_worker.py FOLDER CASE ...      each with its run in FOLDER/CASE
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import model as gpt
import parallel
import plots
import train_dpo
import train_reward
import train_sft

SHARED = {"steps": 5, "eval_every": 5, "eval_samples": 4, "eval_answers": 0, "log_every": 1, "grad_clip": 0.5, "warmup": 2}
CASES = {   # name: (script, its flags); in fp64, but for those at the end
    "accumulation": (train_sft, {"accumulate": 2, "lr": 1e-3}),
    "pma": (train_sft, {"accumulate": 3, "optimizer": "adamw-pma", "lr": 1e-3, "variance_every": 3}),
    "lion-pma": (train_sft, {"accumulate": 3, "optimizer": "lion-pma", "lr": 1e-4, "lora_rank": 2}),
    "agma": (train_sft, {"accumulate": 2, "optimizer": "agma", "lr": 1e-3, "loss_on": "all"}),
    "dpo": (train_dpo, {"accumulate": 2, "lr": 1e-4, "reference": "live"}),
    "cdpo": (train_dpo, {"accumulate": 2, "lr": 1e-4, "reference": "live", "loss": "cdpo", "optimizer": "adamw-pma"}),
    "dpo-lora": (train_dpo, {"accumulate": 2, "lr": 1e-3, "lora_rank": 2, "lora_bias": "all"}),
    "reward": (train_reward, {"accumulate": 2, "lr": 1e-3}),
    "fp32-sgd": (train_sft, {"accumulate": 2, "optimizer": "sgd", "lr": 1e-2}),
    "fp16": (train_sft, {"steps": 4, "eval_every": 4, "optimizer": "sgd", "lr": 1e-2, "dtype": "float16"}),
    "fp32-cache": (train_dpo, {"accumulate": 2, "optimizer": "sgd", "lr": 1e-2, "loss": "cdpo", "reference": "cache"}),
}


def main(folder, names):
    parallel.join()
    data = f"{folder}/train.jsonl,{folder}/valid.jsonl"
    load, reward_model, plots.draw = gpt.load, gpt.reward_model, lambda folder: None
    for name in names:
        script, flags = CASES[name]
        wide = not name.startswith("fp")
        gpt.load = (lambda *a, **k: load(*a, **k).double()) if wide else load
        gpt.reward_model = (lambda *a, **k: reward_model(*a, **k).double()) if wide else reward_model
        cfg = script.Config(out=f"{folder}/{parallel.size()}/{name}", data=data, init=f"{folder}/start",
                            micro_batch=4 // parallel.size(), **{**SHARED, **flags})
        if name == "fp16":   # the step after the stop leaves one process without a row
            script.main(replace(cfg, stop_at=2))
            cfg = replace(cfg, resume=True)
        final = script.main(cfg)
        print(json.dumps({"case": name, "rank": parallel.rank(), "samples": final["samples"]}), flush=True)
    parallel.leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
