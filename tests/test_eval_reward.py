"""
eval_reward.py: its rewards are those of plain full-logit computations one dialogue at a time, its intervals and win rates those
that one counts by hand, and it never sees the training data but for the row that says so.

    python -m pytest -q tests/test_eval_reward.py
"""
import builtins
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import data
import eval_reward
import minihh
import model as gpt
import train_dpo
import train_sft
from files import InputError, write_checkpoint

ROOT = Path(__file__).parent.parent
TINY = eval_reward.Config(limit=24, max_new_tokens=8, show=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two short runs and a reward model with a random head: (SFT folder, DPO folder, reward model)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(train_sft.plots, "draw", lambda folder: None)
        path = tmp_path_factory.mktemp("runs")
        small = {"eval_samples": 40, "eval_every": 100, "micro_batch": 8}
        train_sft.main(train_sft.Config(steps=20, keep_every=10, out=str(path / "sft"), **small))
        train_dpo.main(train_dpo.Config(steps=10, lr=1e-3, init=str(path / "sft"), out=str(path / "dpo"), **small))
        shutil.copy(path / "dpo" / "last.pt", path / "dpo" / "best.pt")   # so few steps need not beat the start on held-out pairs
        reward = gpt.reward_model(gpt.load(str(path / "sft")))
        torch.manual_seed(3)
        torch.nn.init.normal_(reward.reward_head.weight)
        write_checkpoint(path / "reward.pt", {"model": reward.state_dict(), "model_config": asdict(reward.config)})
        yield str(path / "sft"), str(path / "dpo"), str(path / "reward.pt")


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(eval_reward.plots, "reward_histograms", lambda *args: None)


def on_cpu(spec):
    return eval_reward.load_judge(spec, torch.device("cpu"), torch.no_grad)


EXAMPLES = [(e.prompt, e.chosen, e.rejected) for e in minihh.examples("test")[:24]]

# ---- oracle ---------------------------------------------------------------------------------------------------------------

def logps(model, prompt, response):
    """From whole logits: no chunks, no batches, no masks."""
    encoding = data.tokenizer(2048)
    p, r = encoding.encode(prompt), encoding.encode(response) + [2047]
    with torch.no_grad():
        logp = model(torch.tensor([p + r]))[0].log_softmax(-1)
    return sum(logp[len(p) - 1 + i, t].item() for i, t in enumerate(r))


def test_dpo_judge_equals_full_logits_in_float64(trained, tmp_path, no_pictures):
    sft, dpo, reward = trained
    policy, ref = gpt.load(dpo).double(), gpt.load(sft).double()
    expected = np.array([[0.5 * (logps(policy, p, y) - logps(ref, p, y)) for y in answers] for p, *answers in EXAMPLES])
    judge = on_cpu(f"dpo:{dpo}")
    prompts, chosen, rejected = zip(*EXAMPLES)
    np.testing.assert_allclose(judge(prompts, chosen), expected[:, 0], atol=1e-3)   # fp32 sums near -100
    won = float(np.mean(expected[:, 0] > expected[:, 1]))
    scores = eval_reward.main(replace(TINY, models=("mini", sft, dpo), judge=reward, out=str(tmp_path)))["models"]
    assert 0 < won < 1 and scores[dpo]["pairs"]["accuracy"] == pytest.approx(won)
    expected = [[logps(model, p, y) for y in answers] for model in (ref, policy) for p, *answers in EXAMPLES]
    won = [np.mean([chosen > rejected for chosen, rejected in half]) for half in (expected[:24], expected[24:])]
    assert [scores[dpo]["pairs"][key] for key in ("init_logp_accuracy", "logp_accuracy")] == pytest.approx(won)
    assert scores[dpo]["init"] == sft and "pairs" not in scores[sft] and "pairs" not in scores["mini"]


def test_reward_judge_equals_one_dialogue_at_a_time(trained):
    """Also of an empty answer, of one with space around it, and in any order."""
    model, encoding = gpt.load(trained[2], kind=gpt.RewardModel).eval(), data.tokenizer(2048)
    prompts, answers = [p for p, *_ in EXAMPLES[:8]], [y.strip() for _, y, _ in EXAMPLES[:6]] + ["", "  Well, hm. \n"]
    expected = []
    for p, a in zip(prompts, [f" {a.strip()}" if a.strip() else "" for a in answers]):
        with torch.no_grad():
            h = model.hidden(torch.tensor([encoding.encode(p) + encoding.encode(a) + [2047]]))[0, -1]
        expected.append((h @ model.reward_head.weight[0] - model.center).item())
    judge = on_cpu(trained[2])
    np.testing.assert_allclose(judge(prompts, answers), expected, atol=1e-5)
    np.testing.assert_allclose(judge(prompts[::-1], answers[::-1]), expected[::-1], atol=1e-5)


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    """A tiny random DeBERTa-v2 with one label, and a word-level tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("deberta")
    words = "[PAD] [UNK] [CLS] [SEP] what is the capital of france paris rome it madrid : human assistant . ?".split()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = tokenizers.normalizers.Lowercase(), tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                         sep_token="[SEP]").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                          intermediate_size=32, num_labels=1, relative_attention=True, initializer_range=0.5,
                                          pos_att_type=["p2c", "c2p"])
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_deberta_judge_equals_transformers_on_question_and_answer(deberta):
    """A single turn is asked in the human's words alone, a longer dialogue with its turns; one by one, without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(deberta)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(deberta).eval()
    cases = [("\n\nHuman: What is the capital of France?\n\nAssistant:", " It is Paris. ", "What is the capital of France?"),
             ("\n\nHuman: What is it?\n\nAssistant: Rome.\n\nHuman: The capital of France?\n\nAssistant:", "Paris",
              "What is it?\n\nAssistant: Rome.\n\nHuman: The capital of France?"),
             ("\n\nHuman: What is it?\n\nAssistant:", "Madrid Madrid Madrid Madrid", "What is it?")]
    with torch.no_grad():
        expected = [model(**tokenizer(question, a.strip(), return_tensors="pt")).logits.item() for _, a, question in cases]
    found = on_cpu(f"deberta:{deberta}")([p for p, *_ in cases], [a for _, a, _ in cases])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 1e-3


def test_deberta_reads_the_end_of_what_is_too_long(deberta):
    """512 tokens; the longer of question and answer loses its beginning."""
    judge = on_cpu(f"deberta:{deberta}")
    a, b = (f"\n\nHuman: {'rome ' * 600}{end}\n\nAssistant:" for end in ("France?", "Madrid"))
    first, second, third = judge([a, b, a.replace("rome", "paris", 3)], ["Paris"] * 3)
    assert first != second and first == third


# ---- worked by hand ---------------------------------------------------------------------------------------------------------

def test_a_model_that_knows_everything_scores_1(trained, tmp_path, monkeypatch, no_pictures):
    """generate is replaced by a parrot of the chosen answers for the first model and of the rejected ones for the second."""
    sft, dpo, reward = trained
    encoding, calls = data.tokenizer(2048), []
    by_prompt = {tuple(encoding.encode(e.prompt)): e for e in minihh.examples("test")}

    def parrot(self, prompts, *args, **kwargs):
        calls.append(1)
        found = [by_prompt[tuple(int(t) for t in p)] for p in prompts]
        return [encoding.encode(e.chosen if len(calls) <= 2 else e.rejected) + [2047] for e in found]   # two modes a model
    monkeypatch.setattr(gpt.GPT, "generate", parrot)
    scores = eval_reward.main(replace(TINY, models=(sft, dpo), judge=reward, out=str(tmp_path)))
    first, second = scores["models"][sft], scores["models"][dpo]
    assert first["greedy"]["right"] == 1 and first["temperature 1"]["right"] == 1 and second["greedy"]["right"] == 0
    assert set(first["greedy"]["right_by_group"].values()) == {1.0}
    for key in ("reward", "reward_95", "words", "distinct_1", "distinct_2"):   # its answers are the data's own
        assert first["greedy"][key] == pytest.approx(scores["own answers"]["test, chosen"][key], abs=1e-5)
        assert second["greedy"][key] == pytest.approx(scores["own answers"]["test, rejected"][key], abs=1e-5)
    duel, judge = scores["against"]["greedy"][dpo][sft], scores["judge"]
    assert duel["right"] == -1 and duel["right_95"] == [-1, -1] and duel["decided"] == 24
    assert duel["judge_agrees"] == pytest.approx(judge["accuracy"]) and duel["win_rate"] == pytest.approx(1 - judge["accuracy"])


def test_against_by_hand():
    """Rewards 1, 2, 3, 4 against 0, 2, 5, 1: won, a tie, lost, won. Right 1, 1, 1, 0 against 0, 1, 0, 1: where just one of them
    is right, the judge agrees in the first and errs in the third and the fourth."""
    found = eval_reward.against(*(np.array(x, dtype=float) for x in ((1, 2, 3, 4), (0, 2, 5, 1), (1, 1, 1, 0), (0, 1, 0, 1))))
    assert found["win_rate"] == (1 + 0.5 + 0 + 1) / 4 and found["reward"] == (1 + 0 - 2 + 3) / 4
    assert found["right"] == 1 / 4 and found["decided"] == 3 and found["judge_agrees"] == pytest.approx(1 / 3)
    same = eval_reward.against(np.ones(4), np.zeros(4), np.ones(4), np.ones(4))
    assert same["win_rate"] == 1 and same["decided"] == 0 and same["judge_agrees"] is None


def test_who_fooled_the_judge_by_hand(capsys):
    """Fooled in the first and the last of five prompts; between them a wrong answer with a lower reward, a right one, and one
    that was wrong before. The largest gain comes first."""
    prompts = [f"\n\nHuman: q{i}\n\nAssistant:" for i in range(5)]
    texts = {(who, "greedy"): [f"{who}{i}" for i in range(5)] for who in "ab"}
    rewards = {("a", "greedy"): np.array([1.0, 1, 1, 1, 1]), ("b", "greedy"): np.array([2.0, 0, 2.5, 3.5, 4])}
    right = {("a", "greedy"): np.array([1.0, 1, 1, 0, 1]), ("b", "greedy"): np.array([0.0, 0, 1, 0, 0])}
    eval_reward.print_fooled(TINY, "b", "a", "greedy", prompts, texts, rewards, right)
    assert capsys.readouterr().out == "    the judge prefers the wrong one by 3.00: 'q4', a: 'a4' (right), b: 'b4' (wrong)\n"
    eval_reward.print_fooled(replace(TINY, show=4), "b", "a", "greedy", prompts, texts, rewards, right)
    assert [line.split(" by ")[1][:4] for line in capsys.readouterr().out.splitlines()] == ["3.00", "1.00"]


def test_bootstrap_by_hand():
    """The interval of a mean of 400 numbers is close to 1.96 standard errors; of equal numbers it is a point."""
    values = np.random.default_rng(5).exponential(size=400)
    low, high = eval_reward.bootstrap(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=half / 8) and high == pytest.approx(values.mean() + half, abs=half / 8)
    assert eval_reward.bootstrap([2.0] * 7) == [2.0, 2.0]
    assert eval_reward.bootstrap(values) == [low, high]
    a, b = values, np.sort(values)
    assert eval_reward.bootstrap(a - b) != eval_reward.bootstrap(a)


def test_describe_by_hand():
    """Words, and n-grams within an answer: of "a b a b" and "a b" the bigrams are ab, ba, ab, ab."""
    row = eval_reward.describe(np.array([1.0, 3.0]), ["a b a b", "a b"], ["x", "y"], np.array([0.0, 1.0]))
    assert row["reward"] == 2 and row["words"] == 3 and row["distinct_1"] == 2 / 6 and row["distinct_2"] == 2 / 4
    assert row["reward_by_group"] == {"x": 1, "y": 3} and row["right"] == 0.5 and row["right_by_group"] == {"x": 0, "y": 1}


def test_pair_accuracy_by_hand():
    """A judge that likes long answers is longer-wins; a tie counts half."""
    pairs = [data.Pair("q", " aaa", " b"), data.Pair("q", " a", " bb"), data.Pair("q", " c", " d"), data.Pair("q", " aaa", " b")]
    found = eval_reward.pair_accuracy(lambda prompts, answers: np.array([len(a) for a in answers]), pairs, None)
    assert found == {"n": 4, "accuracy": 2.5 / 4, "interval": data.interval(2.5 / 4, 4)}


def test_an_answer_is_judged_once():
    """Equal answers have equal rewards, even from a judge that is never of the same opinion; spaces around do not count."""
    asked, rng = [], np.random.default_rng(1)
    judge = eval_reward.once(lambda prompts, answers: asked.append(answers) or rng.random(len(answers)))
    a = judge(["p", "q", "p"], ["yes", "yes", " yes "])
    b = judge(("p", "p"), ("no", "yes"))
    assert a[0] == a[2] == b[1] != a[1] and asked == [("yes", "yes"), ("no",)]
    assert judge([], []).shape == (0,)


def test_a_duel_from_the_other_side():
    """Equal to the duel with its sides changed, but for the bootstrap's rounding."""
    rng = np.random.default_rng(2)
    one, two, right, other = rng.random(40), rng.random(40), *rng.integers(0, 2, (2, 40)).astype(float)
    found = eval_reward.mirrored(eval_reward.against(one, two, right, other))
    expected = eval_reward.against(two, one, other, right)
    assert found.keys() == expected.keys() and found["win_rate"] < 1 != 0.5
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-9), key


def test_an_answer_ends_at_a_new_human_turn(trained):
    """And what comes behind is not judged."""
    model = gpt.load(trained[0])
    ids = data.tokenizer(2048).encode(" Paris.\n\nHuman: And Spain?")
    assert eval_reward.as_text(model, ids) == "Paris."
    assert eval_reward.as_text(model, data.tokenizer(2048).encode(" It is Rome. ") + [2047]) == "It is Rome."
    script, stopped = ids + [5] * 20, []

    def scripted(prompts, n, temperature, top_k, top_p, stop, generator):
        for length in range(1, n):
            if stop(script[:length]):
                stopped.append(script[:length])
                return [script[:length]]
    model.generate = lambda *args, stop, generator: scripted(*args, stop, generator)
    eval_reward.answer(replace(TINY, max_new_tokens=48), model, [[1]], 0.0)
    assert data.tokenizer(2048).decode(stopped[0]) == " Paris.\n\nHuman:"


def test_checkpoints_stand_in_the_order_of_their_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run/step-100.pt", "run/step-20.pt", "run/best.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert eval_reward.expand(["gpt2", "run/step-*.pt", "run/", "gpt2"]) == ["gpt2", "run/step-20.pt", "run/step-100.pt", "run"]
    with pytest.raises(InputError, match="nothing fits runs/x-"):
        eval_reward.expand(["runs/x-*"])
    scores = {"models": {"gpt2": 0, "a/step-10.pt": 1, "a/step-2.pt": 2, "b/step-3.pt": 3, "step-7.pt": 4, "step-8.pt": 5}}
    assert eval_reward.over_steps(scores) == {"a": [(2, 2), (10, 1)], ".": [(7, 4), (8, 5)]}


# ---- properties -------------------------------------------------------------------------------------------------------------

def test_files_and_printed_tables(trained, tmp_path, capsys):
    sft, dpo, reward = trained
    cfg = replace(TINY, models=("mini", f"{sft}/step-*.pt", sft, dpo), judge=reward, out=str(tmp_path))
    scores = eval_reward.main(cfg)
    text = capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(json.dumps(scores))
    generations = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert len(generations) == 6 * 2 * 24 + 3 * 24 and {g["mode"] for g in generations} == {"greedy", "temperature 1", "data"}
    mine = [g for g in generations if g["model"] == sft and g["mode"] == "greedy"]
    assert [g["prompt"] for g in mine] == [p for p, *_ in EXAMPLES]
    assert np.mean([g["reward"] for g in mine]) == pytest.approx(scores["models"][sft]["greedy"]["reward"])
    assert np.mean([g["right"] for g in mine]) == scores["models"][sft]["greedy"]["right"]
    for words in ("the judge ranks", "longer-wins", "reward [95 %]", "win rate by reward", f"{dpo} against {sft}, greedy",
                  "implicit reward's accuracy", "test, rejected", "training, chosen"):
        assert words in text
    for name in ("rewards.png", "steps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    again = eval_reward.main(replace(cfg, models=("mini", sft, dpo)))
    assert not (tmp_path / "steps.png").exists()   # nothing of an earlier call stays
    assert again["models"]["mini"] == scores["models"]["mini"]   # samples have a generator of their own, whoever else is judged


def test_the_readme_has_the_demos_scores():
    """Its table, row by row, and what it says of pairs, from the file beside the pictures."""
    here = Path(__file__).parent.parent
    readme, scores = (here / "README.md").read_text(), json.loads((here / "results/demo/scores.json").read_text())

    def reward(row):
        low, high = row["reward_95"]
        return f"{row['reward']:+.2f} [{low:+.2f}, {high:+.2f}] | {row['words']:.1f} | {row['distinct_2']:.2f}"
    for name, label in (("mini", "random weights"), ("runs/demo-sft", "SFT"), ("runs/demo-dpo", "DPO"),
                        ("runs/demo-cdpo", "CDPO, gamma 1")):
        greedy, sampled = scores["models"][name]["greedy"], scores["models"][name]["temperature 1"]
        right = [greedy["right"], *(greedy["right_by_group"][group] for group in ("look-up", "chat", "refusal", "computed"))]
        assert (f"| {label} | {reward(greedy)} | {' | '.join(f'{x:.3f}' for x in right)} | {reward(sampled)} | "
                f"{sampled['right']:.3f} |") in readme
    for name, label in (("test, chosen", "the data's own, chosen"), ("test, rejected", "the data's own, rejected"),
                        ("training, chosen", "of training, chosen (a fifth flipped)")):
        assert f"| {label} | {reward(scores['own answers'][name])} |" in readme
    for name in ("runs/demo-dpo", "runs/demo-cdpo"):
        found = scores["models"][name]["pairs"]
        assert f"{found['accuracy']:.3f} [{found['interval'][0]:.3f}, {found['interval'][1]:.3f}]" in readme


def test_a_run_is_compared_with_its_start_under_any_name(trained, tmp_path, monkeypatch, no_pictures, capsys):
    """--init sft/ and --models ./sft are the same folder. A judge that has learned nothing correlates with nothing."""
    sft, dpo, reward = trained
    monkeypatch.chdir(Path(sft).parent)
    shutil.copytree(dpo, tmp_path / "dpo")
    config = json.loads((tmp_path / "dpo" / "config.json").read_text())
    config["flags"]["init"] = "sft/"
    (tmp_path / "dpo" / "config.json").write_text(json.dumps(config))
    zero = gpt.load(reward, kind=gpt.RewardModel)
    torch.nn.init.zeros_(zero.reward_head.weight)
    write_checkpoint(tmp_path / "zero.pt", {"model": zero.state_dict(), "model_config": asdict(zero.config)})
    scores = eval_reward.main(replace(TINY, models=("./sft", str(tmp_path / "dpo")), judge=str(tmp_path / "zero.pt"), show=0,
                                      temperatures=(0.7, 0.70000001), out=str(tmp_path / "out")))
    assert scores["models"][str(tmp_path / "dpo")]["init"] == "./sft"
    assert f"{tmp_path / 'dpo'} against ./sft" in capsys.readouterr().out
    assert scores["judge"]["correlation_with_words"] == 0 and scores["judge"]["accuracy"] == 0.5
    assert {"temperature 0.7", "temperature 0.70000001"} < scores["models"]["./sft"].keys()


def test_training_data_enters_one_row_alone(trained, tmp_path, monkeypatch, no_pictures):
    """Other training pairs change nothing but the row of the training set's own answers."""
    sft, _, reward = trained
    cfg = replace(TINY, models=(sft,), judge=reward, temperatures=(0.0,), out=str(tmp_path))
    scores, real = eval_reward.main(cfg), data.load_pairs

    def other(*args, **more):
        found, counts = real(*args, **more)
        return {**found, "train": found["train"][100:]}, counts
    monkeypatch.setattr(data, "load_pairs", other)
    again = eval_reward.main(cfg)
    assert again["own answers"].pop("training, chosen") != scores["own answers"].pop("training, chosen")
    assert again == scores


def test_prompts_from_a_file(trained, tmp_path, no_pictures, capsys):
    """Topics are groups; nothing is said about pairs or the data's own answers. The project's own file has 40 prompts."""
    sft, _, reward = trained
    prompts, topics = eval_reward.read_prompts(ROOT / "prompts.jsonl")
    assert len(prompts) == len(set(prompts)) == 40 and len(set(topics)) == 7
    assert all(p.startswith("\n\nHuman: ") and p.endswith("\n\nAssistant:") and p.count("Human:") == 1 for p in prompts)
    path = tmp_path / "few.jsonl"
    path.write_text('{"prompt": " What is it? ", "topic": "a"}\n\n{"prompt": "\\n\\nHuman: Hi\\n\\nAssistant: Yes?\\n\\nHuman: Go'
                    '\\n\\nAssistant: \\n"}\n')
    assert eval_reward.read_prompts(path) == (["\n\nHuman: What is it?\n\nAssistant:",
                                               "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go\n\nAssistant:"], ["a", ""])
    scores = eval_reward.main(replace(TINY, models=(sft, "mini"), judge=reward, prompts=str(path), out=str(tmp_path / "out")))
    row = scores["models"][sft]["greedy"]
    assert row["n"] == 2 and row["reward_by_group"].keys() == {"a", ""} and "right" not in row
    assert scores["own answers"] == {} and "accuracy" not in scores["judge"]
    assert "few.jsonl" in capsys.readouterr().out


def test_prompts_from_dialogues_without_a_rejected_answer(trained, tmp_path, no_pictures, capsys):
    """Judged as others; what needs pairs is left out."""
    sft, dpo, reward = trained
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": f"Add {i} and 1.", "output": str(i + 1)} for i in range(60)]))
    scores = eval_reward.main(replace(TINY, models=(sft, dpo), judge=reward, data=str(tmp_path / "a.json"), limit=4,
                                      temperatures=(0.0,), out=str(tmp_path / "out")))
    assert list(scores["own answers"]) == ["test, chosen", "training, chosen"] and scores["judge"] == {"name": reward}
    assert scores["models"][dpo]["greedy"]["n"] == 4 and "pairs" not in scores["models"][dpo]
    assert "test pairs" not in capsys.readouterr().out


def test_a_prompt_of_the_data_that_is_too_long_is_cut_and_counted(trained, capsys):
    model = gpt.load(trained[0])
    turns = "".join(f"\n\nHuman: Number {i}?\n\nAssistant: Yes." for i in range(80)) + "\n\nHuman: And now?\n\nAssistant:"
    (short, long) = eval_reward.encode_prompts(TINY, model, "it", [EXAMPLES[0][0], turns])
    text = data.tokenizer(2048).decode(long)
    assert len(long) <= 512 - 8 and text.startswith("\n\nHuman: Number") and text.endswith("And now?\n\nAssistant:")
    assert data.tokenizer(2048).decode(short) == EXAMPLES[0][0] and "1 prompts cut from the left" in capsys.readouterr().out


def test_greedy_answers_do_not_depend_on_the_batch(trained):
    model = gpt.load(trained[0]).double()   # fp64: fp32 rounds differently at another batch size, where two tokens may tie
    prompts = eval_reward.encode_prompts(TINY, model, "it", [p for p, *_ in EXAMPLES])
    assert eval_reward.answer(TINY, model, prompts, 0.0) == [eval_reward.answer(TINY, model, [p], 0.0)[0] for p in prompts]


def test_sampling_is_what_the_flags_say(trained):
    """The seed decides; a tiny share of probability leaves the likeliest token alone."""
    model = gpt.load(trained[0])
    prompts = eval_reward.encode_prompts(TINY, model, "it", [p for p, *_ in EXAMPLES])
    greedy, one, two, narrow = (eval_reward.answer(replace(TINY, **flags), model, prompts, t) for flags, t in (
        ({}, 0.0), ({"seed": 1}, 1.0), ({"seed": 2}, 1.0), ({"top_p": 1e-6}, 1.0)))
    assert one != two and one != greedy and narrow == greedy
    assert one == eval_reward.answer(replace(TINY, seed=1), model, prompts, 1.0)


def test_a_reference_that_has_changed_is_refused(trained, tmp_path):
    sft, dpo, reward = trained
    shutil.copytree(dpo, tmp_path / "dpo")
    config = json.loads((tmp_path / "dpo" / "config.json").read_text())
    config["init_sha256"] = "0" * 64
    (tmp_path / "dpo" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="holds other weights now"):
        eval_reward.load_judge(f"dpo:{tmp_path / 'dpo'}", torch.device("cpu"), torch.no_grad)


@pytest.mark.parametrize("lines, message", [
    ('{"prompt": "a"}\nnot json\n', ":2: expected a JSON object, found 'not json'"),
    ('{"prompt": "a"}\n{"question": "b"}\n', ':2: expected the key "prompt"'),
    ('{"prompt": " "}\n', ':1: expected the key "prompt"'),
    ('["a"]\n', ':1: expected the key "prompt"'),
    ("\n", ": no prompts in it"),
    ('{"prompt": "\\n\\nHuman: Hi"}\n', ":1: expected a question, or a dialogue"),
    ('{"prompt": "a"}\n{"prompt": "b\\n\\nAssistant: c"}\n', ":2: expected a question, or a dialogue"),
    (b'{"prompt": "\xff"}\n', ":1: expected a JSON object"),
    ('{"prompt": "' + "word " * 600 + '"}\n', "prompt 1 has"),
])
def test_bad_prompts_are_one_clear_line(trained, tmp_path, lines, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    with pytest.raises(InputError, match="prompts.jsonl") as e:
        eval_reward.main(replace(TINY, models=(trained[0],), judge=trained[2], prompts=str(path), out=str(tmp_path / "out")))
    assert message in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_deberta_without_its_packages_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install transformers sentencepiece protobuf"):
        on_cpu("deberta")


def test_what_is_no_such_judge_is_refused(trained, deberta, tmp_path, monkeypatch):
    sft, dpo, reward = trained
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for spec, message in ((sft, "is a language model, and a reward model is needed here"),
                          (f"dpo:{sft}", "not a run of train_dpo.py"),
                          (f"deberta:{tmp_path / 'none'}", "none: no such folder"), (f"deberta:{tmp_path}", "cannot be loaded")):
        with pytest.raises(InputError, match=message) as e:
            on_cpu(spec)
        assert "\n" not in str(e.value)
    shutil.copytree(deberta, tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    model = transformers.DebertaV2ForSequenceClassification.from_pretrained(deberta, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "two")
    assert config["model_type"] == "deberta-v2"
    with pytest.raises(InputError, match="found 2 labels"):
        on_cpu(f"deberta:{tmp_path / 'two'}")
