"""
Judge models by what they answer: a score table, win rates, and on the embedded data the truth beside them.

    python eval_reward.py                                              # mini, runs/sft, runs/dpo, judged by runs/reward
    python eval_reward.py --models gpt2,runs/sft-medium,runs/dpo-medium --data hh-rlhf --judge runs/reward-medium
    python eval_reward.py --models "gpt2,runs/sft-medium/step-*.pt" --prompts prompts.jsonl --judge deberta

Every model answers the same prompts with the same seed and sampling; a judge gives each answer a reward:

    a run of train_reward.py        our reward model; 0 is the mean of chosen training responses
    dpo:RUN                         the implicit reward of a DPO run, beta (log pi - log ref); dpo is dpo:runs/dpo
    deberta, deberta:FOLDER         OpenAssistant/reward-model-deberta-v3-large-v2, as 002_... uses it (needs transformers)

The table has the mean reward with its 95 % interval (bootstrap over prompts) of each model and of the data set's own answers
(000_..., table 1), and beside it length and distinct n-grams, since reward models like length. Checkpoints step-N.pt of a run
(--keep-every) become a curve of score over steps (002_..., figure 2). On the embedded data a checker knows whether an answer is
right (minihh.check), and the table says where the judge and the truth disagree.

Every answer with its reward is kept in generations.jsonl.
"""
import glob
import itertools
import json
import os
import re
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
import losses
import minihh
import model as gpt
import plots
import runs
from files import InputError, fingerprint, read_json, write_atomically

DEBERTA = "OpenAssistant/reward-model-deberta-v3-large-v2"


@dataclass
class Config:
    out: str = "runs/eval"                                        # folder; what an earlier call left there is replaced
    models: tuple[str, ...] = ("mini", "runs/sft", "runs/dpo")    # what to judge, with commas between; a * stands for any text
    judge: str = "runs/reward"                                    # a reward model's run, dpo[:RUN] or deberta[:FOLDER]
    data: str = "minihh"                                          # as in training; the test split of it
    prompts: str | None = None                                    # a .jsonl file of prompts, in the place of --data
    limit: int = 1000                                             # at most so many prompts, pairs and answers of the data's own
    temperatures: tuple[float, ...] = (0.0, 1.0)                  # of the answers, with commas between; 0 is greedy
    top_p: float = 1.0                                            # sample among the likeliest tokens of this much probability
    max_new_tokens: int = 48                                      # per answer
    show: int = 4                                                 # prompts whose answers are printed
    seed: int = 1                                                 # of the sampled answers
    device: str = "auto"                                          # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"        # autocast; auto is bfloat16 on a GPU that has it

# ----------------------------------------------------------------------------------------------------------------------
# judges: functions from lists of prompts and answers, as text, to an array of rewards

def as_tokens(model, prompts, answers):
    """The dialogues as in training: an answer keeps one leading space and is closed by end-of-text, also where --max-new-tokens
    cut it. data.Tokens; what stands as rejected there is not read."""
    pairs = [data.Pair(p, f" {a.strip()}" if a.strip() else "", "") for p, a in zip(prompts, answers)]
    tokens, cut = data.encode(pairs, model.config.vocab_size, model.config.block_size)
    if cut["responses cut"] or cut["prompts cut"]:
        print(f"too long for the judge's context of {model.config.block_size}: {data.describe(cut)}")
    return tokens


def each(tokens, rows_to_values):
    """rows_to_values(rows) -> (len(rows),) for all dialogues, in batches of similar length; an array in their own order."""
    found = np.zeros(len(tokens))
    for rows in data.in_order(tokens, 32):
        found[rows] = rows_to_values(rows).float().cpu().numpy()
    return found


def once(judge):
    """The judge, with every answer to a prompt judged once: equal answers have equal rewards to the bit, whoever gives them. A
    matrix product is not the same in another batch."""
    known = {}

    def remembering(prompts, answers):
        keys = [(prompt, answer.strip()) for prompt, answer in zip(prompts, answers)]
        new = [key for key in dict.fromkeys(keys) if key not in known]
        if new:
            known.update(zip(new, judge(*zip(*new)).tolist()))
        return np.array([known[key] for key in keys])
    return remembering


def reward_judge(name, device, autocast):
    model = gpt.load(name, kind=gpt.RewardModel).to(device).eval()

    @torch.no_grad()
    def judge(prompts, answers):
        tokens = as_tokens(model, prompts, answers)
        with autocast():
            return each(tokens, lambda rows: losses.batch_rewards(model, data.reward_batch(tokens, rows, ["chosen"]).to(device)))
    return judge


def dpo_judge(name, device, autocast):
    flags = run_config(name).get("flags", {})
    if "beta" not in flags:
        raise InputError(f"--judge dpo: {name} is not a run of train_dpo.py")
    policy, reference = (m.to(device).eval() for m in (gpt.load(name), load_reference(name)))

    @torch.no_grad()
    def judge(prompts, answers):
        tokens = as_tokens(policy, prompts, answers)

        def implicit_rewards(rows):
            batch = data.sft_batch(tokens, rows).to(device)
            return flags["beta"] * (losses.batch_logps(policy, batch) - losses.batch_logps(reference, batch))
        with autocast():
            return each(tokens, implicit_rewards)
    return judge


def deberta_judge(where, device):
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        raise InputError("--judge deberta needs more packages: pip install transformers sentencepiece protobuf") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, truncation_side="left")   # the end of a long dialogue matters most
        model = AutoModelForSequenceClassification.from_pretrained(where).float().to(device).eval()
    except (OSError, ValueError, ImportError) as e:   # no network, not such a model, a tokenizer that wants sentencepiece
        raise InputError(f"--judge deberta: {where} cannot be loaded ({textwrap.shorten(str(e), 150)}); --judge deberta:FOLDER "
                         "takes one that is there") from None
    if model.config.num_labels != 1:
        raise InputError(f"--judge deberta: expected one score a dialogue, found {model.config.num_labels} labels in {where}")

    @torch.no_grad()
    def judge(prompts, answers):
        # of a single turn its words alone
        questions = [p.removeprefix(data.HUMAN).removesuffix(data.ASSISTANT).strip() for p in prompts]
        lengths = [len(q) + len(a) for q, a in zip(questions, answers)]
        found, order = np.zeros(len(answers)), np.argsort(lengths, kind="stable")
        for rows in (order[i:i + 16] for i in range(0, len(order), 16)):
            batch = tokenizer([questions[i] for i in rows], [answers[i].strip() for i in rows], padding=True, truncation=True,
                              max_length=512, return_tensors="pt").to(device)
            found[rows] = model(**batch).logits[:, 0].float().cpu().numpy()
        return found
    return judge


def load_judge(spec, device, autocast):
    kind, _, where = spec.partition(":")
    if kind == "deberta" and where and not Path(where).is_dir():
        raise InputError(f"--judge {spec}: no such folder")
    if kind == "deberta":
        return once(deberta_judge(where or DEBERTA, device))
    if kind == "dpo":
        return once(dpo_judge(where or "runs/dpo", device, autocast))
    if not spec or not Path(spec).exists():
        raise InputError(f"--judge: no reward model {spec!r}: train_reward.py makes one; other judges are dpo[:RUN] and "
                         "deberta[:FOLDER]")
    return once(reward_judge(spec, device, autocast))


def run_config(name):
    """The config.json of a run folder or of the folder of a checkpoint; {} for what is not a run of ours."""
    path = (Path(name).parent if Path(name).is_file() else Path(name)) / "config.json"
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found.get("flags"), dict) else {}


def load_reference(name):
    """The model that a DPO run's reward is measured against: its --init, if that still holds the same weights."""
    config = run_config(name)
    init = config["flags"]["init"]
    reference = gpt.load(init, block_size=config["flags"]["block_size"])
    if fingerprint(reference.state_dict()) != config["init_sha256"]:
        raise InputError(f"{name}: its --init {init} holds other weights now, so its rewards cannot be measured")
    return reference

# ----------------------------------------------------------------------------------------------------------------------
# prompts and answers

def read_prompts(path):
    """A .jsonl file, {"prompt": text, "topic": text} a line -> (prompts in HH-RLHF's format, topics). A prompt is what a human
    asks, or a whole dialogue that begins with "\\n\\nHuman:" and ends with "\\n\\nAssistant:"; the topic may be missing."""
    prompts, topics = [], []
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as e:   # UnicodeDecodeError is a ValueError
                raise InputError(f"{path}:{n}: expected a JSON object, found {line.strip()[:40].decode(errors='replace')!r} "
                                 f"({e})") from None
            if row is None:
                continue
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
                raise InputError(f'{path}:{n}: expected the key "prompt" with a text, found '
                                 f"{line.strip()[:60].decode(errors='replace')!r}")
            text = row["prompt"].rstrip()
            if not (text.startswith(data.HUMAN) and text.endswith(data.ASSISTANT)):
                if data.HUMAN in text or data.ASSISTANT in text:
                    raise InputError(f'{path}:{n}: expected a question, or a dialogue from "\\n\\nHuman:" to "\\n\\nAssistant:", '
                                     f"found {text[:60]!r}")
                text = f"{data.HUMAN} {text.strip()}{data.ASSISTANT}"
            prompts.append(text)
            topics.append(str(row.get("topic", "")))
    if not prompts:
        raise InputError(f"{path}: no prompts in it")
    return prompts, topics


def encode_prompts(cfg, model, name, prompts):
    """Token ids that leave room for the answer. A data set's prompt that is too long is cut from the left, as in training; one
    that the user wrote is refused."""
    config = model.config
    encoding, room = data.tokenizer(config.vocab_size), config.block_size - cfg.max_new_tokens
    if room < 1:
        raise InputError(f"--max-new-tokens {cfg.max_new_tokens}: {name} has a context of {config.block_size} tokens")
    ids, turn = [encoding.encode_ordinary(p) for p in prompts], encoding.encode_ordinary(data.HUMAN)
    long = [i for i, p in enumerate(ids) if len(p) > room]
    if long and cfg.prompts:
        raise InputError(f"{cfg.prompts}: prompt {long[0] + 1} has {len(ids[long[0]])} tokens, expected at most {room}: the "
                         f"context of {name}, {config.block_size}, less {cfg.max_new_tokens} for the answer")
    if long:
        print(f"{name}: {len(long)} prompts cut from the left to {room} tokens")
    return [data.cut_prompt(p, room, turn) if len(p) > room else p for p in ids]


def answer(cfg, model, prompts, temperature):
    """An answer to each prompt, a list of token ids: a list of lists of ids. It ends at end-of-text or at a new human turn."""
    c, device, found = model.config, model.wte.weight.device, []
    decode, generator = data.tokenizer(c.vocab_size).decode, torch.Generator(device).manual_seed(cfg.seed)
    size = max(1, min(300, 10 ** 9 // (2 * c.n_layer * c.n_embd * c.block_size)))   # a KV cache of at most 4 GB in fp32
    for i in range(0, len(prompts), size):
        found += model.generate(prompts[i:i + size], cfg.max_new_tokens, temperature, None, cfg.top_p, generator=generator,
                                stop=lambda ids: data.HUMAN in decode(ids[-len(data.HUMAN):]))   # a token is a byte at least
    return found


def as_text(model, ids):
    """An answer's text: what comes before end-of-text or a new human turn."""
    eot = model.config.vocab_size - 1
    return data.tokenizer(eot + 1).decode([t for t in ids if t != eot]).partition(data.HUMAN)[0].strip()

# ----------------------------------------------------------------------------------------------------------------------
# numbers

@lru_cache(maxsize=2)
def draws(n, samples=2000):
    """How often each of n values is drawn in `samples` draws of n with replacement, (samples, n)."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.multinomial(n, [1 / n] * n, size=100).astype(np.float32) for _ in range(samples // 100)])


def bootstrap(values):
    """The 95 % interval of a mean: the middle of the means of many draws. The same draws for any values of the same number."""
    means = draws(len(values)) @ np.asarray(values, dtype=np.float64) / len(values)
    return [float(x) for x in np.quantile(means, (0.025, 0.975))]


def by_group(values, names):
    return {name: float(np.mean([v for v, n in zip(values, names) if n == name])) for name in dict.fromkeys(names)}


def describe(rewards, texts, groups, right=None):
    """A row of the table."""
    words = [text.split() for text in texts]
    row = {"n": len(texts), "reward": float(np.mean(rewards)), "reward_95": bootstrap(rewards),
           "reward_by_group": by_group(rewards, groups) if groups else {},
           "words": data.mean_length(words), "distinct_1": data.distinct(words, 1), "distinct_2": data.distinct(words, 2)}
    return row if right is None else row | {"right": float(right.mean()), "right_by_group": by_group(right, groups)}


def against(rewards, other_rewards, right=None, other_right=None):
    """One model against another on the same prompts: how often its reward is the higher one (a tie counts half), the mean
    difference, and with the truth known the difference of that, and whether the judge agrees where just one of them is right."""
    difference = rewards - other_rewards
    wins = np.where(difference == 0, 0.5, difference > 0)
    found = {"win_rate": float(wins.mean()), "win_rate_95": bootstrap(wins),
             "reward": float(difference.mean()), "reward_95": bootstrap(difference)}
    if right is not None:
        change = right - other_right
        decided = change != 0
        found |= {"right": float(change.mean()), "right_95": bootstrap(change), "decided": int(decided.sum()),
                  "judge_agrees": float(np.where(change > 0, wins, 1 - wins)[decided].mean()) if decided.any() else None}
    return found


def mirrored(found):
    """The same duel seen from the other side."""
    def back(key, value):
        if key in ("decided", "judge_agrees"):
            return value
        whole = 1 if key.startswith("win_rate") else 0
        return [whole - x for x in reversed(value)] if isinstance(value, list) else whole - value
    return {key: back(key, value) for key, value in found.items()}


def ranked(won, examples):
    """Of test pairs that were won (1), lost (0) or tied (1/2): the share, with the interval for that many, and by group, skill
    and flaw."""
    found = {"n": len(won), "accuracy": float(won.mean()), "interval": data.interval(float(won.mean()), len(won))}
    for by, names in () if examples is None else (("group", [minihh.GROUPS[e.skill] for e in examples]),
                                                  ("skill", [e.skill for e in examples]), ("flaw", [e.flaw for e in examples])):
        found[f"by_{by}"] = by_group(won, names)
    return found


def pair_accuracy(judge, pairs, examples):
    """How often a judge ranks the test pairs right."""
    prompts, chosen, rejected = zip(*pairs)
    margins = judge(prompts, chosen) - judge(prompts, rejected)
    return ranked(np.where(margins == 0, 0.5, margins > 0), examples)


@torch.no_grad()
def implicit_accuracy(name, pairs, examples, device, autocast):
    """How often a DPO run's implicit reward ranks the test pairs right, as its own evaluation counts (losses.reward_wins); beside
    it the log-probabilities of the run, and those of its start, a baseline."""
    models = [model.to(device).eval() for model in (gpt.load(name), load_reference(name))]
    tokens, _ = data.tokenize(pairs, models[0].config.vocab_size, models[0].config.block_size)
    logps = torch.zeros(4, len(tokens))   # chosen and rejected, of the policy and of the reference
    with autocast():
        for rows in data.in_order(tokens, 32):
            batch = data.pair_batch(tokens, rows).to(device)
            logps[:, rows] = torch.cat([losses.batch_logps(model, batch).float() for model in models]).cpu().view(4, -1)
        won = losses.reward_wins(*logps)
    return {**ranked(won.numpy(), examples), "logp_accuracy": float(losses.wins(*logps[:2]).mean()),
            "init_logp_accuracy": float(losses.wins(*logps[2:]).mean())}

# ----------------------------------------------------------------------------------------------------------------------

def check_models(names, configs):
    """What can be found wrong before the first answer: no such model, a reward model, a DPO run's reference that has changed."""
    for name in names:
        path = Path(name)
        held = path.is_file() or any((path / f).is_file() for f in ("best.pt", "model.safetensors", "pytorch_model.bin"))
        if not (held or name in gpt.SIZES or name.startswith("hf:")) or configs[name].get("script") == "train_reward.py":
            gpt.load(name)   # says what is wrong
    for name in {str(Path(name).parent if Path(name).is_file() else name) for name in names}:
        if "beta" in run_config(name).get("flags", {}):
            load_reference(name)


def expand(patterns):
    """The names of the models: a pattern with a * becomes the paths that it fits, step-20 before step-100."""
    names = []
    for pattern in map(str.strip, patterns):
        if not pattern:
            raise InputError("--models: expected names with commas between, found an empty one")
        if "*" in pattern:
            paths = glob.glob(pattern)
            if not paths:
                raise InputError(f"--models: nothing fits {pattern}")
            names += sorted(paths, key=lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path)])
        else:
            names.append(pattern.rstrip("/"))
    return list(dict.fromkeys(names))


def validate(cfg):
    for name, low in (("limit", 1), ("max_new_tokens", 1), ("show", 0), ("seed", 0)):
        if getattr(cfg, name) < low:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {low}, found {getattr(cfg, name)}")
    if cfg.seed >= 2 ** 63:
        raise InputError(f"--seed: expected a number below 2^63, found {cfg.seed}")
    if not 0 < cfg.top_p <= 1:
        raise InputError(f"--top-p: expected a share above 0, at most 1, found {cfg.top_p}")
    if not all(0 <= t <= 100 for t in cfg.temperatures):
        raise InputError(f"--temperatures: expected 0 to 100, found {', '.join(map(str, cfg.temperatures))}")


def main(cfg):
    validate(cfg)
    device, autocast = runs.setup(cfg)
    names = expand(cfg.models)
    configs = {name: run_config(name) for name in names}
    modes = {("greedy" if t == 0 else f"temperature {t:.9g}"): t for t in cfg.temperatures}
    out, paths = Path(cfg.out), {os.path.abspath(name): name for name in names if Path(name).exists()}
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: expected a folder, found a file")
    if (out / "config.json").exists():
        raise InputError(f"--out {out}: holds a model or a training run: choose another folder")
    other = sorted(f.name for f in out.glob("*"))
    if other and not ((out / "scores.json").is_file() and "judge" in read_json(out / "scores.json")):
        raise InputError(f"--out {out}: holds other files ({other[0]}), and no evaluation: choose another folder")
    check_models(names, configs)
    judge = load_judge(cfg.judge, device, autocast)

    # ---- prompts, and the data set's own answers -------------------------------------------------------------------
    own, pairs, examples = {}, None, None
    if cfg.prompts:
        prompts, groups = (x[:cfg.limit] for x in read_prompts(cfg.prompts))
    else:
        found, _ = data.load_pairs(cfg.data, ("test", "train"), need="response")
        pairs = found["test"][:cfg.limit]
        train = found["train"][:len(pairs)]   # as many: distinct-n falls with the number of answers
        prompts, groups = [p.prompt for p in pairs], None
        own = {"test, chosen": (prompts, [p.chosen for p in pairs]), "test, rejected": (prompts, [p.rejected for p in pairs]),
               "training, chosen": ([p.prompt for p in train], [p.chosen for p in train])}
        if data.form(pairs) != "pairs":
            del own["test, rejected"]
            pairs = None
        if cfg.data == "minihh":
            examples = minihh.examples("test")[:cfg.limit]
            groups = [minihh.GROUPS[e.skill] for e in examples]

    scores = {"judge": {"name": cfg.judge}, "own answers": {}, "models": {}, "against": {}}
    rewards, right, texts = {}, {}, {}   # by (model, mode)
    for name, (asked, answers) in own.items():
        key, of_prompts = (name, "data"), asked is prompts
        rewards[key], texts[key] = judge(asked, answers), [a.strip() for a in answers]
        if examples and of_prompts:
            right[key] = np.array([minihh.check(e, text) for e, text in zip(examples, texts[key])], dtype=float)
        scores["own answers"][name] = describe(rewards[key], texts[key], groups if of_prompts else None, right.get(key))
    if pairs:
        tested = [(name, "data") for name in ("test, chosen", "test, rejected")]
        words = [len(text.split()) for key in tested for text in texts[key]]
        both = np.concatenate([rewards[key] for key in tested])
        correlation = float(np.corrcoef(words, both)[0, 1]) if np.ptp(words) and np.ptp(both) else 0.0
        scores["judge"] |= {**pair_accuracy(judge, pairs, examples), "correlation_with_words": correlation}

    # ---- the models' answers ------------------------------------------------------------------------------------------
    for name in names:
        model = gpt.load(name).to(device).eval()
        ids = encode_prompts(cfg, model, name, prompts)
        if pairs and name == names[0]:   # in tokens
            scores["judge"]["longer_wins"] = data.longer_wins(data.encode(pairs, model.config.vocab_size, 2 ** 20)[0])
        init = configs[name].get("flags", {}).get("init")
        score = scores["models"][name] = {"init": paths.get(os.path.abspath(init), init) if init else None}
        for mode, temperature in modes.items():
            with autocast():
                texts[name, mode] = [as_text(model, a) for a in answer(cfg, model, ids, temperature)]
            rewards[name, mode] = judge(prompts, texts[name, mode])
            if examples:
                right[name, mode] = np.array([minihh.check(e, text) for e, text in zip(examples, texts[name, mode])], dtype=float)
            score[mode] = describe(rewards[name, mode], texts[name, mode], groups, right.get((name, mode)))
        del model
        if pairs and "beta" in configs[name].get("flags", ()):   # its implicit reward on the test pairs
            score["pairs"] = implicit_accuracy(name, pairs, examples, device, autocast)
    for mode in modes:
        duels = scores["against"][mode] = {name: {} for name in names}
        for a, b in itertools.combinations(names, 2):
            duels[a][b] = against(rewards[a, mode], rewards[b, mode], right.get((a, mode)), right.get((b, mode)))
            duels[b][a] = mirrored(duels[a][b])

    # ---- files, pictures, tables -------------------------------------------------------------------------------------
    out.mkdir(parents=True, exist_ok=True)
    for old in ("rewards.png", "steps.png"):
        (out / old).unlink(missing_ok=True)
    write_atomically(out / "scores.json", json.dumps(scores, indent=2).encode())
    lines = []
    for (name, mode), answers in texts.items():
        asked = own[name][0] if mode == "data" else prompts
        for i, (prompt, text) in enumerate(zip(asked, answers)):
            line = {"model": name, "mode": mode, "prompt": prompt, "answer": text, "reward": float(rewards[name, mode][i])}
            lines.append(json.dumps(line | ({"right": bool(right[name, mode][i])} if (name, mode) in right else {})) + "\n")
    write_atomically(out / "generations.jsonl", "".join(lines).encode())
    plots.reward_histograms(scores, rewards, list(modes), out / "rewards.png")
    curves = over_steps(scores)
    if curves:
        plots.score_over_steps(scores, curves, list(modes), out / "steps.png")
    report(cfg, scores, prompts, texts, rewards, right, list(modes))
    print(f"\nkept in {out}: scores.json, generations.jsonl, rewards.png{', steps.png' if curves else ''}")
    return scores


def over_steps(scores):
    """{run's folder: [(step, its scores), ...]} of the runs of which several checkpoints step-N.pt were judged."""
    curves = {}
    for name, score in scores["models"].items():
        if found := re.fullmatch(r"(.*?)/?step-(\d+)\.pt", name):
            curves.setdefault(found[1] or ".", []).append((int(found[2]), score))
    return {folder: sorted(points, key=lambda point: point[0]) for folder, points in curves.items() if len(points) > 1}


def report(cfg, scores, prompts, texts, rewards, right, modes):
    models, judge = scores["models"], scores["judge"]
    width = max(20, *map(len, models))
    for i in range(min(cfg.show, len(prompts))):
        print(f"--- prompt{prompts[i]}")
        for name in models:
            print(f"  {name:{width}} {rewards[name, modes[0]][i]:+6.2f} {texts[name, modes[0]][i]!r}")
    print(f"\n{len(prompts)} prompts of {cfg.prompts or cfg.data}, answers of at most {cfg.max_new_tokens} tokens, judged by "
          f"{cfg.judge}")
    if "accuracy" in judge:
        low, high = judge["interval"]
        print(f"the judge ranks {judge['accuracy']:.3f} [{low:.3f}, {high:.3f}] of the test pairs right (longer-wins "
              f"{judge['longer_wins']:.3f}); an answer's reward and its number of words correlate by "
              f"{judge['correlation_with_words']:+.2f}")
        print_groups(judge)
    for mode in modes:
        groups = list(next(iter(models.values()))[mode].get("right_by_group", ()))
        print(f"\n{mode:{width}} {'reward [95 %]':>22} {'words':>6} {'distinct-1':>11} {'distinct-2':>11}"
              + ("     right: all" + "".join(f"{g:>10}" for g in groups) if groups else ""))
        for name, row in {**{name: score[mode] for name, score in models.items()}, **scores["own answers"]}.items():
            low, high = row["reward_95"]
            shares = [row["right"], *row["right_by_group"].values()] if "right" in row else []
            print(f"{name:{width}} {row['reward']:+7.2f} [{low:+.2f}, {high:+.2f}] {row['words']:6.1f} {row['distinct_1']:11.2f} "
                  f"{row['distinct_2']:11.2f}     " + "".join(f"{x:10.3f}" for x in shares))
    for mode in modes:
        if 1 < len(models) <= 8:
            print(f"\nwin rate by reward, {mode}: share of prompts where the row's answer beats the column's")
            print(" " * width + "".join(f" {name.removeprefix('runs/')[-16:]:>17}" for name in models))
            for a in models:
                cells = ["" if a == b else "{:.2f} [{:.2f}, {:.2f}]".format(w["win_rate"], *w["win_rate_95"])
                         for b in models for w in [scores["against"][mode][a].get(b)]]
                print(f"{a:{width}}" + "".join(f" {cell:>17}" for cell in cells))
    print()
    for name, score in models.items():
        for mode in modes if score["init"] in models else ():
            w = scores["against"][mode][name][score["init"]]
            line = f"{name} against {score['init']}, {mode} (paired, 95 %): reward {w['reward']:+.3f} {span(w['reward_95'])}"
            if "right" in w:
                line += f", right {w['right']:+.3f} {span(w['right_95'])}"
            if w.get("decided"):
                line += f"; of {w['decided']} prompts where just one is right, the judge prefers it in {w['judge_agrees']:.2f}"
            print(line)
            if "right" in w:
                print_fooled(cfg, name, score["init"], mode, prompts, texts, rewards, right)
        if "pairs" in score:
            p = score["pairs"]
            print(f"{name}: implicit reward's accuracy on the test pairs {p['accuracy']:.3f} [{p['interval'][0]:.3f}, "
                  f"{p['interval'][1]:.3f}]; log-prob of {score['init']} {p['init_logp_accuracy']:.3f}")
            print_groups(p)


def span(interval):
    return f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"


def print_groups(found):
    for by in ("by_group", "by_flaw"):   # by_skill is in scores.json
        if by in found:
            print(f"    {by.replace('_', ' ')}: " + ", ".join(f"{k} {v:.2f}" for k, v in found[by].items()))


def print_fooled(cfg, name, init, mode, prompts, texts, rewards, right):
    """Where the judge prefers the model's wrong answer to its start's right one: the reward rises, the truth falls."""
    gain = rewards[name, mode] - rewards[init, mode]
    fooled = [i for i in np.argsort(-gain) if gain[i] > 0 and right[name, mode][i] < right[init, mode][i]]
    for i in fooled[:min(2, cfg.show)]:
        question = prompts[i].rpartition(data.HUMAN)[2].removesuffix(data.ASSISTANT).strip()
        before, after = (textwrap.shorten(texts[who, mode][i], 80) for who in (init, name))
        print(f"    the judge prefers the wrong one by {gain[i]:.2f}: {textwrap.shorten(question, 60)!r}, {init}: {before!r} "
              f"(right), {name}: {after!r} (wrong)")


if __name__ == "__main__":
    runs.command_line(main, Config)
