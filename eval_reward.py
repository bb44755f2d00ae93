"""
Judge models on the test split, which no training script reads.

    python eval_reward.py                                             # mini, runs/sft and runs/dpo on the embedded data
    python eval_reward.py --models gpt2-medium,runs/sft-medium,runs/dpo-medium --data hh-rlhf

Two questions, two tables. Are the answers right? On the embedded data a checker knows (minihh.check); every model answers the
same test prompts, greedily and sampled at temperature 1. Does the model tell the better answer from the worse? A DPO run has an
implicit reward, beta (log pi - log ref), and we count the test pairs it ranks right. Both matter: a DPO run can win nearly all
pairs while its answers get worse. A model is compared, prompt by prompt, with the one it was trained from.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
import losses
import minihh
import model as gpt
import runs
from files import InputError, fingerprint, read_json, write_atomically


@dataclass
class Config:
    out: str = "runs/eval"                                        # folder; its scores.json and generations.jsonl are replaced
    models: tuple[str, ...] = ("mini", "runs/sft", "runs/dpo")    # what to judge, with commas between
    data: str = "minihh"                                          # as in training; the test split of it
    prompts: int = 1000                                           # how many test pairs at most
    max_new_tokens: int = 48                                      # per answer
    show: int = 4                                                 # prompts whose answers are printed
    seed: int = 1                                                 # of the sampled answers
    device: str = "auto"                                          # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"        # autocast; auto is bfloat16 on a GPU that has it


def run_config(name):
    """The config.json of a run folder or of the folder of a checkpoint; {} for what is not a run of ours."""
    path = (Path(name).parent if Path(name).is_file() else Path(name)) / "config.json"
    found = read_json(path) if path.is_file() else {}
    return found if "flags" in found else {}


def load_reference(name, config):
    """The model that a DPO run's reward is measured against: its --init, if that still holds the same weights."""
    init = config["flags"]["init"]
    reference = gpt.load(init, block_size=config["flags"]["block_size"])
    if fingerprint(reference.state_dict()) != config["init_sha256"]:
        raise InputError(f"{name}: its --init {init} holds other weights now, so its rewards cannot be measured")
    return reference


def answer(cfg, model, tokens, temperature):
    """An answer to each prompt: a list of lists of ids, end-of-text included."""
    generator = torch.Generator(model.wte.weight.device).manual_seed(cfg.seed)
    prompts = [tokens[i][0] for i in range(len(tokens))]
    found = []
    c = model.config
    size = max(1, min(300, 10 ** 9 // (2 * c.n_layer * c.n_embd * c.block_size)))   # a KV cache of at most 4 GB in fp32
    for i in range(0, len(prompts), size):
        found += model.generate(prompts[i:i + size], cfg.max_new_tokens, temperature, generator=generator)
    return found


@torch.no_grad()
def pair_logps(model, tokens, autocast):
    """Log-probabilities of the chosen and the rejected responses, (2, n)."""
    found = torch.zeros(2, len(tokens))
    for rows in data.in_order(tokens, 32):
        batch = data.pair_batch(tokens, rows).to(model.wte.weight.device)
        with autocast():
            found[:, rows] = losses.batch_logps(model, batch).float().cpu().view(2, -1)
    return found


def half_width(differences):
    """Half of the 95 % interval of a mean of paired differences."""
    return 1.96 * float(np.std(differences, ddof=1)) / len(differences) ** 0.5


def by_group(values, names):
    return {name: float(np.mean([v for v, n in zip(values, names) if n == name])) for name in dict.fromkeys(names)}


def main(cfg):
    for name, low in (("prompts", 2), ("max_new_tokens", 1), ("show", 0), ("seed", 0)):
        if getattr(cfg, name) < low:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {low}, found {getattr(cfg, name)}")
    device, autocast = runs.setup(cfg)
    models = list(dict.fromkeys(name.rstrip("/") for name in cfg.models))
    configs = {name: run_config(name) for name in models}
    references = {name: load_reference(name, config) for name, config in configs.items() if "beta" in config.get("flags", ())}
    checked = cfg.data == "minihh"
    pairs, _ = data.load_pairs(cfg.data, ("test",))
    pairs = pairs["test"][:cfg.prompts]
    examples = minihh.examples("test")[:cfg.prompts] if checked else None
    skills = [e.skill for e in examples] if checked else None
    groups = [minihh.GROUPS[s] for s in skills] if checked else None

    scores, right, generations, shown = {}, {}, [], []
    for name in models:
        model = gpt.load(name).to(device).eval()
        tokens, _ = data.tokenize(pairs, model.config.vocab_size, model.config.block_size)
        decode = data.tokenizer(model.config.vocab_size).decode
        init = configs[name].get("flags", {}).get("init")
        score = scores[name] = {"init": init, "n": len(pairs), "longer_wins": data.longer_wins(tokens)}
        for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            with autocast():
                answers = answer(cfg, model, tokens, temperature)
            texts = [decode([t for t in a if t != model.config.vocab_size - 1]) for a in answers]
            score[mode] = {"length": data.mean_length(answers), "distinct_2": data.distinct(answers, 2)}
            if checked:
                right[name, mode] = np.array([minihh.check(e, text) for e, text in zip(examples, texts)], dtype=float)
                score[mode] |= {"right": float(right[name, mode].mean()), "by_group": by_group(right[name, mode], groups),
                                "by_skill": by_group(right[name, mode], skills)}
                if (init, mode) in right:
                    d = right[name, mode] - right[init, mode]
                    score[mode] |= {"against_init": float(d.mean()), "against_init_95": half_width(d)}
            generations += [{"model": name, "mode": mode, "prompt": p.prompt, "answer": text} for p, text in zip(pairs, texts)]
            if mode == "greedy":
                shown.append(texts[:cfg.show])
        if name in references:
            policy, ref = (pair_logps(m, tokens, autocast) for m in (model, references.pop(name).to(device).eval()))
            won = losses.reward_wins(*policy, *ref).numpy()
            accuracy, init_accuracy = float(won.mean()), float(losses.wins(*ref).mean())
            score["pairs"] = {"beta": configs[name]["flags"]["beta"], "reward_accuracy": accuracy,
                              "interval": data.interval(accuracy, len(won)), "logp_accuracy": float(losses.wins(*policy).mean()),
                              "init_logp_accuracy": init_accuracy}
            if checked:
                score["pairs"] |= {"by_group": by_group(won, groups), "by_skill": by_group(won, skills),
                                   "by_flaw": by_group(won, [e.flaw for e in examples])}

    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "scores.json", json.dumps(scores, indent=2).encode())
    write_atomically(out / "generations.jsonl", "".join(json.dumps(g) + "\n" for g in generations).encode())
    report(cfg, scores, pairs, shown)
    return scores


def report(cfg, scores, pairs, shown):
    width = max(20, *map(len, scores))
    for i in range(min(cfg.show, len(pairs))):
        print(f"--- test prompt{pairs[i].prompt}")
        for name, texts in zip(scores, shown):
            print(f"  {name:{width}} {texts[i]!r}")
    print(f"\n{len(pairs)} test prompts of {cfg.data}, answers of at most {cfg.max_new_tokens} tokens")
    for mode in ("greedy", "sampled"):
        groups = list(next(iter(scores.values()))[mode].get("by_group", ()))
        columns = ["all", *groups] if groups else []
        print(f"\n{mode + (', share right' if groups else ''):{width}}" + "".join(f"{c:>10}" for c in columns)
              + f"{'tokens':>10}{'distinct-2':>12}")
        for name, s in scores.items():
            s = s[mode]
            shares = [s["right"], *s["by_group"].values()] if groups else []
            print(f"{name:{width}}" + "".join(f"{x:10.3f}" for x in shares) + f"{s['length']:10.1f}{s['distinct_2']:12.2f}")
    print()
    for name, s in scores.items():
        for mode in ("greedy", "sampled"):
            if "against_init" in s[mode]:
                print(f"{name} against {s['init']}, {mode}: {s[mode]['against_init']:+.3f} +- {s[mode]['against_init_95']:.3f} "
                      "(paired, 95 %)")
        if "pairs" in s:
            p = s["pairs"]
            low, high = p["interval"]
            print(f"{name}: reward accuracy on the test pairs {p['reward_accuracy']:.3f} [{low:.3f}, {high:.3f}]; longer-wins "
                  f"{s['longer_wins']:.3f}, log-prob of {s['init']} {p['init_logp_accuracy']:.3f}")
            for by in ("by_group", "by_flaw", "by_skill"):
                if by in p:
                    print(f"    {by.replace('_', ' ')}: " + ", ".join(f"{k} {v:.2f}" for k, v in p[by].items()))


if __name__ == "__main__":
    runs.command_line(main, Config)
