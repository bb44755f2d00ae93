"""
Bad input: one clear line on stderr, exit status 2, nothing written or changed. One table for all programs.

    python -m pytest -q tests/test_bad_input.py

A word in capitals stands for a file or folder of the fixture `bad`, which makes them all. Damaged files by the thousand:
studies/fuzz.py.
"""
import fcntl
import gzip
import json
import pickle
import runpy
import shutil
import struct
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import chat
import eval_reward
import model as gpt
import runs
import train_dpo
import train_reward
import train_sft
from files import write_checkpoint

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train_sft.py": train_sft, "train_dpo.py": train_dpo, "train_reward.py": train_reward, "eval_reward.py": eval_reward,
           "chat.py": chat}
# What each program is given before the words of a row, which win.
BEFORE = {"train_sft.py": "--out NEW --steps 2 --micro-batch 2 --eval-samples 2 --eval-answers 0",
          "train_dpo.py": "--out NEW --init mini --steps 2", "train_reward.py": "--out NEW --init SFT --steps 2",
          "eval_reward.py": "--out NEW --judge REWARD --models mini", "chat.py": "--model SFT --prompt Hello"}


class Evil:
    def __reduce__(self):
        return print, ("this was run",)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """{WORD: path}, all in one folder."""
    top = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(train_sft.plots, "draw", lambda folder: None)
        patch.chdir(top)
        small = {"steps": 2, "micro_batch": 2, "eval_every": 2, "eval_samples": 2, "eval_answers": 0, "log_every": 1}
        for name, more in (("SFT", {}), ("CUT", {"stop_at": 1}), ("LORA", {"lora_rank": 2, "init": "SFT"})):
            train_sft.main(train_sft.Config(out=name, **small, **more))
        train_dpo.main(train_dpo.Config(out="DPO", init="SFT", **small))
        reward = gpt.reward_model(gpt.load("SFT"))
        write_checkpoint("REWARD", {"model": reward.state_dict(), "model_config": asdict(reward.config)})

        # runs that cannot go on
        for name in ("LOCKED", "NO-METRICS", "OTHER-METRICS", "OLD", "TYPED", "LESS", "DIVERGED", "BEST-ONLY"):
            shutil.copytree("CUT", name)
        Path("NO-METRICS/metrics.jsonl").unlink()
        text = Path("OTHER-METRICS/metrics.jsonl").read_text()
        Path("OTHER-METRICS/metrics.jsonl").write_text(text.replace('"step": 0', '"step": 7'))
        for name, more, flags in (("OLD", {"format": 0}, {}), ("TYPED", {}, {"steps": "many"}), ("LESS", {}, {"colour": "red"})):
            config = json.loads(Path(name, "config.json").read_text())
            Path(name, "config.json").write_text(json.dumps({**config, **more, "flags": {**config["flags"], **flags}}))
        shutil.copy("BEST-ONLY/best.pt", "BEST-ONLY/last.pt")
        Path("GONE").mkdir()
        for file in Path("CUT").iterdir():
            if file.name != "last.pt":
                shutil.copy(file, "GONE")
        Path("EMPTY").mkdir()
        Path("NOTES").mkdir()
        Path("NOTES/diary.txt").write_text("dear diary")

        # models
        whole = Path("SFT/best.pt").read_bytes()
        middle = len(whole) // 2
        Path("half.pt").write_bytes(whole[:middle])
        Path("flipped.pt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:])
        torch.save({"sha256": "", "model": Evil(), "model_config": {}}, "evil.pt")
        Path("pickled.pt").write_bytes(pickle.dumps({"model": Evil()}, 2))
        model = gpt.GPT(gpt.GPTConfig(block_size=8, vocab_size=61, n_layer=1, n_head=1, n_embd=4))
        for name, change in (("shape", {"ln_f.bias": torch.zeros(5)}), ("dtype", {"ln_f.bias": torch.zeros(4, dtype=torch.long)}),
                             ("nan", {"ln_f.bias": torch.full((4,), float("nan"))}), ("small", {})):
            write_checkpoint(f"{name}.pt", {"model": {**model.state_dict(), **change}, "model_config": asdict(model.config)})
        for name in ("hf", "llama", "long-header", "cut-safetensors", "layers"):
            gpt.export(model, name)
        config = json.loads(Path("hf/config.json").read_text())
        Path("llama/config.json").write_text(json.dumps({**config, "model_type": "llama"}))
        Path("layers/config.json").write_text(json.dumps({**config, "n_layer": 10 ** 9}))
        Path("long-header/model.safetensors").write_bytes(struct.pack("<Q", 2 ** 62) + b"{}")
        whole = Path("hf/model.safetensors").read_bytes()
        Path("cut-safetensors/model.safetensors").write_bytes(whole[:-8])

        # data
        row = {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}
        good = json.dumps(row).encode() + b"\n"
        same = json.dumps({**row, "rejected": row["chosen"]}).encode() + b"\n"
        for name, content in (("text.jsonl", good + b"chosen, rejected\n"), ("keys.jsonl", good + b'\n{"chosen": "a"}\n'),
                              ("list.jsonl", b"[]\n"), ("marker.jsonl", good + b'{"chosen": "a", "rejected": "b"}\n'),
                              ("latin.jsonl", good + b'{"chosen": "\xff"}\n'), ("same.jsonl", 3 * same), ("no.jsonl", b""),
                              ("long.jsonl", good + b"x" * (10 ** 7 + 1)), ("a.csv", good), ("FILE", b"mine"),
                              ("cut.jsonl.gz", gzip.compress(good * 100)[:-20]), ("object.json", good),
                              ("cut.json", b'["\\n\\nHuman: Hi'), ("item.json", b'[{"instruction": "a", "output": "b"}, 7]'),
                              ("key.json", b'[{"instruction": "a"}]'), ("marker.json", b'["Hi"]'),
                              ("no.json", b'[{"instruction": "a", "output": " "}]'), ("latin.json", b'[\n"\xff"]'),
                              ("good.json", b'[{"instruction": "a", "output": "b"}]'), ("latin.txt", b"a\nb \xff\n"),
                              ("no.txt", b"\n"), ("good.txt", b"a b c\n" * 900),
                              ("prompts.jsonl", b'{"prompt": "Hi"}\n{"prompt"\n'), ("number.jsonl", b'{"prompt": 7}\n'),
                              ("turns.jsonl", b'{"prompt": "\\n\\nHuman: Hi"}\n'),
                              ("much.jsonl", json.dumps({"prompt": "word " * 900}).encode())):
            Path(name).write_bytes(content)
    return top


TABLE = [
    # data (part 1): file and line
    ("train_sft.py", "--data nowhere.jsonl", "no data set 'nowhere.jsonl': expected minihh, hh-rlhf, hh-rlhf/SUBSET, alpaca"),
    ("train_sft.py", "--data text.jsonl", "text.jsonl:2: expected a JSON object, found 'chosen, rejected'"),
    ("train_sft.py", "--data keys.jsonl", 'keys.jsonl:3: expected the keys "chosen" and "rejected" with a text each, found c'),
    ("train_sft.py", "--data list.jsonl", "list.jsonl:1: expected the keys"),
    ("train_sft.py", "--data marker.jsonl", 'marker.jsonl:2: expected the turn marker "\\n\\nAssistant:" in "chosen", found'),
    ("train_sft.py", "--data latin.jsonl", "latin.jsonl:2: expected UTF-8 text"),
    ("train_sft.py", "--data long.jsonl", "long.jsonl:2: expected a row a line, found a line of over 10,000,000 bytes"),
    ("train_sft.py", "--data cut.jsonl.gz", ": the file is cut off or damaged (Compressed file ended before"),
    ("train_sft.py", "--data same.jsonl", "--data same.jsonl: the train split is empty (3 dropped: identical responses)"),
    ("train_sft.py", "--data no.jsonl", "--data no.jsonl: the train split is empty (no row was dropped)"),
    ("train_sft.py", "--data a.csv", "a.csv: expected a .jsonl, .jsonl.gz, .json or .txt file"),
    ("train_sft.py", "--data EMPTY", "EMPTY: expected .jsonl or .jsonl.gz files in this folder, found none"),
    ("train_sft.py", "--data a,b,c", "--data: expected TRAIN,VALID, found 3 paths in 'a,b,c'"),
    ("train_sft.py", "--data hh-rlhf/helpful", "no subset 'helpful' of hh-rlhf: expected helpful-base, harmless-base"),
    ("train_sft.py", "--data object.json", "object.json: expected a JSON list, found dict"),
    ("train_sft.py", "--data cut.json", "cut.json: expected a JSON list, found '[\"\\\\n\\\\nHuman: Hi' (Unterminated string"),
    ("train_sft.py", "--data item.json", 'item.json: item 2: expected a dialogue, or the keys "instruction" and "output"'),
    ("train_sft.py", "--data key.json", "with a text each, found instruction"),
    ("train_sft.py", "--data marker.json", 'marker.json: item 1: expected the turn marker "\\n\\nAssistant:", found \'Hi\''),
    ("train_sft.py", "--data no.json", "--data no.json: the train split is empty (1 dropped: empty response)"),
    ("train_sft.py", "--data latin.json", "latin.json:2: expected UTF-8 text"),
    ("train_sft.py", "--data good.txt", "good.txt: plain text has no responses: it is for train_sft.py --loss-on all"),
    ("train_sft.py", "--data good.json,good.txt", "plain text has no responses: it is for train_sft.py --loss-on all"),
    ("train_sft.py", "--data latin.txt --loss-on all", "latin.txt:2: expected UTF-8 text"),
    ("train_sft.py", "--data no.txt --loss-on all", "--data no.txt: the train split is empty"),
    ("train_dpo.py", "--data good.json,good.json", "good.json has no pairs: chosen and rejected responses are needed here"),
    ("train_dpo.py", "--data good.json,good.json --dry-run", "good.json has no pairs: chosen and rejected responses are needed"),
    ("train_reward.py", "--data good.json,good.json", "good.json has no pairs: chosen and rejected responses are needed here"),
    ("train_reward.py", "--data good.txt", "good.txt: plain text has no responses"),
    ("eval_reward.py", "--data good.txt", "good.txt: plain text has no responses"),
    ("train_dpo.py", "--data keys.jsonl", "keys.jsonl:3: expected the keys"),
    ("train_reward.py", "--data keys.jsonl", "keys.jsonl:3: expected the keys"),
    ("eval_reward.py", "--data text.jsonl", "text.jsonl:2: expected a JSON object"),
    ("eval_reward.py", "--data same.jsonl,same.jsonl", "has no test split"),
    # no network (part 1)
    ("train_sft.py", "--init gpt2", "Nothing was kept as whole; without a network use --init mini, --data minihh or a"),
    ("train_sft.py", "--data hh-rlhf/helpful-base", "without a network use --init mini, --data minihh or a local path"),
    ("train_sft.py", "--data alpaca", "without a network use --init mini, --data minihh or a local path"),
    ("train_sft.py", "--init hf:../../x", "hf:../../x: expected hf:OWNER/REPOSITORY"),
    ("train_sft.py", "--init hf:owner/..", "hf:owner/..: expected hf:OWNER/REPOSITORY"),
    ("train_sft.py", "--init random:gpt3", "random:gpt3: expected random: and one of mini, gpt2"),
    # models and checkpoints (parts 1 and 6)
    ("train_sft.py", "--init gpt3", "no model 'gpt3': expected mini, gpt2"),
    ("train_sft.py", "--init EMPTY", "EMPTY: expected best.pt (a run), model.safetensors or pytorch_model.bin (Hugging Face)"),
    ("train_sft.py", "--init half.pt", "half.pt: cut off, damaged, or not a file of plain tensors"),
    ("train_sft.py", "--init flipped.pt", "flipped.pt: damaged: the SHA-256 of its content is not the one it was written with"),
    ("train_sft.py", "--init evil.pt", "evil.pt: holds code, print, which is never run"),
    ("train_sft.py", "--init pickled.pt", "pickled.pt: holds code, print, which is never run: not a file of plain tensors"),
    ("train_sft.py", "--init shape.pt", "1 tensors do not fit the model, first ln_f.bias: expected shape (4,), found (5,)"),
    ("train_sft.py", "--init dtype.pt", "dtype.pt: expected floating-point numbers, found ln_f.bias of torch.int64"),
    ("train_sft.py", "--init nan.pt", "nan.pt: ln_f.bias holds numbers that are not finite"),
    ("train_sft.py", "--init small.pt", "block_size 8 is too small: expected at least 128"),
    ("train_sft.py", "--init llama", "llama/config.json: expected model_type 'gpt2', found 'llama'"),
    ("train_sft.py", "--init long-header", "model.safetensors: a header of 4611686018427387904 bytes in a file of 10"),
    ("train_sft.py", "--init cut-safetensors", "the file is cut off or damaged"),
    ("train_sft.py", "--init layers", "do not make 1000000000 layers"),
    ("train_sft.py", "--init LORA/last.pt", "LORA/last.pt: holds only what a LoRA run trains: give the run's folder"),
    ("train_sft.py", "--init REWARD", "REWARD is a reward model, and a language model is needed here"),
    ("train_dpo.py", "--init runs/none-such", "no model 'runs/none-such'"),
    ("train_reward.py", "--init runs/none", "no model 'runs/none'"),
    # flags that do not exist or make no sense (part 1)
    ("train_sft.py", "--learning-rate 1", "unrecognized arguments: --learning-rate 1; -h lists the flags"),
    ("train_sft.py", "--lr fast", "argument --lr: invalid float value: 'fast'"),
    ("train_sft.py", "--lr nan", "--lr: expected at least 0, found nan"),
    ("train_sft.py", "--lr inf", "--lr: expected a finite number, found inf"),
    ("train_sft.py", "--loss-on prompt", "invalid choice: 'prompt'"),
    ("train_sft.py", "--steps -1", "--steps: expected at least 0, found -1"),
    ("train_sft.py", "--micro-batch 0", "--micro-batch: expected at least 1, found 0"),
    ("train_sft.py", "--epochs inf", "--epochs: expected a finite number"),
    ("train_reward.py", "--keep-every 0", "--keep-every: expected at least 1, found 0"),
    ("train_sft.py", "--seed 99999999999999999999", "--seed: expected a number below 2^63"),
    ("train_sft.py", "--device abacus", "--device abacus: "),
    ("train_sft.py", "--device meta", "--device meta: expected cpu, cuda or mps"),
    ("train_sft.py", "--device cuda", "--device cuda: "),
    ("train_sft.py", "--dtype float64", "invalid choice: 'float64'"),
    ("train_sft.py", "--block-size 4096", "block_size 4096: mini has positions for 1 to 512 tokens"),
    ("train_sft.py", "--block-size 100", "block_size 100 is too small: expected at least 128"),
    ("train_sft.py", "--dropout 1", "--dropout: expected a share below 1, found 1"),
    ("train_sft.py", "--half third", "invalid choice: 'third'"),
    ("train_sft.py", "--variance-every 0", "--variance-every: expected at least 1, found 0"),
    ("train_dpo.py", "--reference none", "invalid choice: 'none'"),
    ("train_dpo.py", "--dropout 0.1", "DPO compares policy and reference with dropout off, expected 0"),
    ("train_dpo.py", "--lora-rank 2 --lora-dropout 0.1", "--lora-dropout 0.1: DPO runs with dropout off"),
    ("train_dpo.py", "--loss cdpo --label-smoothing 0.1", "--label-smoothing goes with --loss dpo only"),
    ("train_dpo.py", "--beta 0", "--beta: expected a number from"),
    ("train_dpo.py", "--gamma -1", "--gamma: expected a number from 0 to inf, found -1"),
    ("train_dpo.py", "--label-smoothing 0.7", "--label-smoothing: expected a number from 0 to 0.5, found 0.7"),
    ("train_dpo.py", "--loss ppo", "invalid choice: 'ppo'"),
    # optimizers (part 2)
    ("train_sft.py", "--optimizer sophia", "no optimizer 'sophia': expected sgd, momentum"),
    ("train_sft.py", "--betas 0.9", "adamw takes 2 numbers in [0, 1), found (0.9,)"),
    ("train_sft.py", "--betas 0.9,x", "expected numbers with commas between them, found '0.9,x'"),
    ("train_sft.py", "--optimizer lion-pma --betas 0.9,1", "lion-pma takes 2 numbers in [0, 1), found (0.9, 1.0)"),
    ("train_sft.py", "--accumulate 0", "--accumulate: expected at least 1, found 0"),
    ("train_sft.py", "--out CUT --resume --optimizer lion", "CUT cannot be resumed with other flags: --optimizer was adamw, n"),
    ("train_sft.py", "--out CUT --resume --accumulate 4", "--accumulate was 1, now 4"),
    # LoRA (part 3)
    ("train_sft.py", "--lora-rank -1", "--lora-rank: expected at least 0, found -1"),
    ("train_sft.py", "--lora-rank 200", "LoRA rank: expected a whole number from 1 to the model's width 128, found 200"),
    ("train_reward.py", "--lora-rank 999", "LoRA rank: expected a whole number from 1 to the model's width 128, found 999"),
    ("train_sft.py", "--lora-rank 2 --lora-alpha 0", "LoRA alpha: expected a finite number above 0, found 0"),
    ("train_sft.py", "--lora-rank 2 --lora-dropout 1", "LoRA dropout: expected a share from 0 to below 1, found 1"),
    ("train_sft.py", "--lora-rank 2 --lora-bias some", "invalid choice: 'some'"),
    ("train_sft.py", "--lora-alpha 4", "go with --lora-rank"),
    ("train_sft.py", "--lora-dropout 0.1", "go with --lora-rank"),
    ("train_sft.py", "--lora-bias all", "go with --lora-rank"),
    ("lora.py", "SFT LORA", "usage: python lora.py BASE ADAPTER FOLDER"),
    ("lora.py", "SFT SFT NEW", "SFT/adapter.pt: no such file: expected an adapter.pt, or the folder of a run"),
    ("lora.py", "CUT LORA NEW", "belongs to another base"),
    ("lora.py", "SFT SFT/best.pt NEW", "expected a file of this project with rank, bias, block_size"),
    ("lora.py", "SFT LORA NOTES", "NOTES is not empty: nothing is overwritten"),
    # judging and chat (part 4)
    ("eval_reward.py", "--models runs/none", "no model 'runs/none'"),
    ("eval_reward.py", "--models REWARD", "is a reward model, and a language model is needed here"),
    ("eval_reward.py", "--models mini,SFT --judge SFT", "is a language model, and a reward model is needed here"),
    ("eval_reward.py", "--models mini,EMPTY", "expected best.pt (a run)"),
    ("eval_reward.py", "--models mini,,mini", "--models: expected names with commas between, found an empty one"),
    ("eval_reward.py", "--judge runs/none", "no reward model 'runs/none': train_reward.py makes one"),
    ("eval_reward.py", "--judge dpo:SFT", "SFT is not a run of train_dpo.py"),
    ("eval_reward.py", "--judge deberta:nowhere", "--judge deberta:nowhere: no such folder"),
    ("eval_reward.py", "--judge deberta:EMPTY", "--judge deberta: EMPTY cannot be loaded"),
    ("eval_reward.py", "--seed x", "invalid int value"),
    ("eval_reward.py", "--limit 0", "--limit: expected at least 1, found 0"),
    ("eval_reward.py", "--out FILE", "expected a folder, found a file"),
    ("eval_reward.py", "--out SFT", "holds a model or a training run"),
    ("eval_reward.py", "--out NOTES", "--out NOTES: holds other files (diary.txt), and no evaluation: choose another folder"),
    ("eval_reward.py", "--top-p 0", "--top-p: expected a share above 0, at most 1, found 0"),
    ("eval_reward.py", "--temperatures 0,-1", "--temperatures: expected 0 to 100"),
    ("eval_reward.py", "--max-new-tokens 512", "--max-new-tokens 512: mini has a context of 512 tokens"),
    ("eval_reward.py", "--prompts nowhere.jsonl", "nowhere.jsonl: No such file"),
    ("eval_reward.py", "--prompts prompts.jsonl", "prompts.jsonl:2: expected a JSON object, found '{\"prompt\"'"),
    ("eval_reward.py", "--prompts number.jsonl", 'number.jsonl:1: expected the key "prompt" with a text'),
    ("eval_reward.py", "--prompts turns.jsonl", "turns.jsonl:1: expected a question, or a dialogue"),
    ("eval_reward.py", "--prompts no.jsonl", "no.jsonl: no prompts in it"),
    ("eval_reward.py", "--prompts much.jsonl", "much.jsonl: prompt 1 has "),
    ("train_reward.py", "--eval-answers 3", "--eval-answers 3: a reward model gives no answers, expected 0"),
    ("train_reward.py", "--init REWARD", "is a reward model, and a language model is needed here"),
    ("chat.py", "--model nowhere", "no model 'nowhere'"),
    ("chat.py", "--versus nowhere", "no model 'nowhere'"),
    ("chat.py", "--model EMPTY", "expected best.pt (a run), model.safetensors or pytorch_model.bin"),
    ("chat.py", "--model REWARD", "is a reward model, and a language model is needed here"),
    ("chat.py", "--model small.pt", "no tokenizer with 61 tokens"),
    ("chat.py", "--model a.csv", "a.csv: cut off, damaged, or not a file of plain tensors"),
    ("chat.py", "--temperature -0.1", "--temperature: expected 0 to 100, found -0.1"),
    ("chat.py", "--temperature inf", "--temperature: expected 0 to 100, found inf"),
    ("chat.py", "--temperature nan", "--temperature: expected 0 to 100, found nan"),
    ("chat.py", "--temperature hot", "argument --temperature: invalid float value: 'hot'"),
    ("chat.py", "--top-k -1", "--top-k: expected at least 0, found -1"),
    ("chat.py", "--top-k 1.5", "argument --top-k: invalid int value: '1.5'"),
    ("chat.py", "--top-p 0", "--top-p: expected"),
    ("chat.py", "--top-p 1.01", "--top-p: expected"),
    ("chat.py", "--top-p nan", "--top-p: expected"),
    ("chat.py", "--max-new-tokens 0", "--max-new-tokens: expected at least 1, found 0"),
    ("chat.py", "--max-new-tokens many", "argument --max-new-tokens: invalid int value: 'many'"),
    ("chat.py", "--prompt=", "--prompt: expected a question, found ''"),
    ("chat.py", "--seed -1", "--seed: expected at least 0 and below 2^63"),
    ("chat.py", f"--seed {2 ** 63}", "--seed: expected at least 0 and below 2^63"),
    ("chat.py", "--dtype float64", "argument --dtype: invalid choice: 'float64'"),
    ("chat.py", "--device abacus", "--device abacus: "),
    ("chat.py", f"--prompt {'no,' * 300}", "tokens, expected at most 256: the context of SFT, 512, less 256 for the answer"),
    ("chat.py", "--colour red", "unrecognized arguments: --colour red"),
    ("model.py", "nowhere NEW", "no model 'nowhere'"),
    ("model.py", "SFT", "usage: python model.py MODEL FOLDER"),
    ("model.py", "SFT NOTES", "NOTES is not empty: nothing is overwritten"),
    ("model.py", "REWARD NEW", "is a reward model, and a language model is needed here"),
    ("plots.py", "NEW", "NEW holds no run: expected config.json and metrics.jsonl in it"),
    ("plots.py", "NO-METRICS", "NO-METRICS holds no run"),
    ("plots.py", "", "required: runs"),
    ("studies/compare.py", "EMPTY", "EMPTY holds no run"),
    ("studies/compare.py", "SFT --x hours", "invalid choice: 'hours'"),
    # run folders (part 6)
    ("train_sft.py", "--out SFT", "SFT already holds a run (config.json): choose --resume, --overwrite or another --out"),
    ("train_sft.py", "--out FILE", "--out FILE is a file: expected a folder, or a name for a new one"),
    ("train_sft.py", "--out FILE --overwrite", "--out FILE is a file: expected a folder, or a name for a new one"),
    ("train_sft.py", "--out NOTES", "NOTES holds other files (diary.txt), and no run: choose another --out"),
    ("train_sft.py", "--out NOTES --overwrite", "NOTES holds other files (diary.txt), and no run: choose another --out"),
    ("train_sft.py", "--out . --overwrite", "and no run: choose another --out"),
    ("train_sft.py", "--out SFT --overwrite --init SFT", "--overwrite of SFT would delete --init SFT: choose another --out"),
    ("train_sft.py", "--out SFT --overwrite --data keys.jsonl", "keys.jsonl:3: expected the keys"),   # nothing is cleared before
    ("train_sft.py", "--resume --overwrite --out CUT", "--resume and --overwrite exclude each other"),
    ("train_sft.py", "--resume", "NEW holds no run to resume: there is no config.json"),
    ("train_reward.py", "--resume", "NEW holds no run to resume: there is no config.json"),
    ("train_sft.py", "--out EMPTY --resume", "EMPTY holds no run to resume: there is no config.json"),
    ("train_sft.py", "--out CUT --resume --lr 0.5", "CUT cannot be resumed with other flags: --lr was 0.004, now 0.5"),
    ("train_sft.py", "--out DPO --resume", "DPO/config.json: a run of train_dpo.py, not of train_sft.py"),
    ("train_dpo.py", "--out CUT --resume", "CUT/config.json: a run of train_sft.py, not of train_dpo.py"),
    ("train_sft.py", "--out OLD --resume", f"OLD is a run of another version of this code: its format is 0, now {runs.FORMAT}"),
    ("train_sft.py", "--out LESS --resume", "LESS is a run of another version of this code: it has --colour"),
    ("train_sft.py", "--out TYPED --resume", "TYPED/config.json: steps is 'many', which is no value of --steps"),
    ("train_sft.py", "--out NO-METRICS --resume", "NO-METRICS/metrics.jsonl is shorter than when last.pt was written"),
    ("train_sft.py", "--out OTHER-METRICS --resume", "metrics.jsonl says something else than when last.pt was written"),
    ("train_sft.py", "--out BEST-ONLY --resume", "BEST-ONLY/last.pt is no checkpoint to resume this run from: it has no at"),
    ("train_sft.py", "--out GONE --resume", "GONE holds a run that has trained, and its last.pt is gone"),
    ("train_sft.py", "--out SFT --resume --stop-at 1", "--stop-at 1: SFT/last.pt is at step 2 already"),
    ("train_sft.py", "--out hf --overwrite", "hf holds other files (config.json), and no run: choose another --out"),
    ("train_sft.py", "--out FILE/run", "--out FILE/run: "),
    ("train_sft.py", "--out=", "--out: expected a name, found ''"),
    ("train_sft.py", "--init=", "--init: expected a name, found ''"),
    ("train_sft.py", "--data=", "--data: expected a name, found ''"),
    ("train_sft.py", "--data ,", "--data: expected a name or a path, found ','"),
    ("eval_reward.py", "--data keys.jsonl,", "--data: expected a name or a path, found 'keys.jsonl,'"),
    ("train_sft.py", "--out LOCKED", "LOCKED already holds a run"),
    ("train_sft.py", "--out LOCKED --resume", "LOCKED: another process is writing this run"),
    ("train_sft.py", "--out LOCKED --overwrite", "LOCKED: another process is writing this run"),
]


def listing(top):
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in top.rglob("*") if path.name != "lock"}


@pytest.mark.parametrize("program, words, message", TABLE, ids=lambda x: None if x in SCRIPTS else x[:60])
def test_bad_input_is_one_line_and_status_2(bad, monkeypatch, capfd, program, words, message):
    monkeypatch.chdir(bad)
    monkeypatch.setenv("HF_HOME", str(bad.parent / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")   # nothing listens there
    monkeypatch.setattr(gpt.GPT, "generate", None)   # all of it is found before the first answer
    before = BEFORE.get(program, "").split()
    if "--resume" in words:   # its flags are the run's own
        before = before[:2]
    monkeypatch.setattr(sys, "argv", [program, *before, *words.split()])
    was = listing(bad)
    with open(bad / "LOCKED/lock", "w") as lock, pytest.raises(SystemExit) as stopped:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if program in SCRIPTS:
            runs.command_line(SCRIPTS[program].main, SCRIPTS[program].Config)
        else:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("downloading ")]
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert len(lines[0]) < 500 and listing(bad) == was   # nothing was written, nothing cleared
