"""
Talk to a model that was trained here.

    python chat.py                                        # runs/dpo
    python chat.py --model runs/sft --temperature 0.7
    python chat.py --versus runs/sft                      # two models' answers side by side
    python chat.py --prompt "What is the capital of France?"
    echo "What is the capital of France?" | python chat.py

The dialogue is written as HH-RLHF writes it, "\\n\\nHuman: ...\\n\\nAssistant: ...", and an answer ends at end-of-text or where
the model begins a new human turn. When it no longer fits the context, the oldest turns are forgotten. Ctrl-C stops the answer and
not the program; /reset begins a new dialogue; /quit or Ctrl-D ends.
"""
import codecs
import shutil
import sys
import textwrap
from dataclasses import dataclass
from typing import Literal

import torch

import data
import model as gpt
import runs
from files import InputError


@dataclass
class Config:
    model: str = "runs/dpo"                # a run, a checkpoint, gpt2[-medium|-large|-xl], a Hugging Face GPT-2 folder
    versus: str | None = None              # a second model, whose answers stand beside the first one's
    prompt: str | None = None              # answer this and end
    temperature: float = 0.7               # of sampling; 0: always the likeliest token
    top_k: int = 0                         # sample among so many of the likeliest tokens; 0: among all
    top_p: float = 0.95                    # sample among the likeliest tokens that hold this much probability
    max_new_tokens: int = 256              # per answer, half of the context at most
    seed: int = 1                          # of the samples
    device: str = "auto"                   # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"   # autocast; auto is bfloat16 on a GPU that has it


CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])   # all but tab and newline: no model moves the cursor


class Answer:
    """An answer that grows token by token: to be used as generate's `stop`. show(text) is given what is certain to belong to it,
    piece by piece: whole characters, no space at either end, and nothing that may still turn out to be a new human turn."""

    def __init__(self, encoding, show):
        self.encoding, self.show, self.bytes = encoding, show, codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.shown = "", 0

    def token(self, ids):
        """Take the newest of these ids; whether the answer is over."""
        self.text += self.bytes.decode(self.encoding.decode_single_token_bytes(ids[-1])).translate(CONTROLS)
        over = data.HUMAN in self.text
        self._show(self.text.partition(data.HUMAN)[0] if over else self._certain())
        return over

    def _certain(self):
        """Without a beginning of a human turn that stands at its end."""
        for n in range(len(data.HUMAN) - 1, 0, -1):
            if self.text.endswith(data.HUMAN[:n]):
                return self.text[:-n]
        return self.text

    def _show(self, certain):
        text = certain.strip()
        if self.show and len(text) > self.shown:
            start, self.shown = self.shown, len(text)   # before show, which Ctrl-C may end: nothing is shown twice
            self.show(text[start:])
        return text

    def end(self):
        return self._show(self.text.partition(data.HUMAN)[0])


class Speaker:
    """A model with its own side of the dialogue, which begins empty."""

    def __init__(self, cfg, name, device, autocast):
        self.cfg, self.name, self.autocast, self.turns = cfg, name, autocast, []
        self.model = gpt.load(name).to(device).eval()
        self.block_size = self.model.config.block_size
        self.encoding = data.tokenizer(self.model.config.vocab_size)
        self.generator = torch.Generator(device).manual_seed(cfg.seed)
        self.most = min(cfg.max_new_tokens, self.block_size // 2)   # tokens of an answer

    def prompt(self, question):
        """Token ids of the dialogue up to the answer to come: the last turns, as many as leave room for it."""
        asked = self.encoding.encode_ordinary(f"{data.HUMAN} {question}{data.ASSISTANT}")
        room, turn = self.block_size - self.most, self.encoding.encode_ordinary(data.HUMAN)
        if len(asked) > room:
            raise InputError(f"the question has {len(asked)} tokens, expected at most {room}: the context of {self.name}, "
                             f"{self.block_size}, less {self.most} for the answer")
        whole = self.encoding.encode_ordinary("".join(self.turns)) + asked
        return whole if len(whole) <= room else data.cut_prompt(whole, room, turn)

    def answer(self, question, show=None):
        """(The answer's text, whether Ctrl-C ended it). show(text) is given each piece as it comes."""
        prompt, answer, stopped = self.prompt(question), Answer(self.encoding, show), False
        try:
            with self.autocast():
                self.model.generate([prompt], self.most, self.cfg.temperature, self.cfg.top_k, self.cfg.top_p, answer.token,
                                    self.generator)
        except KeyboardInterrupt:
            stopped = True
        text = answer.end()
        self.turns.append(f"{data.HUMAN} {question}{data.ASSISTANT} {text}".rstrip())
        return text, stopped


def side_by_side(names, texts, width):
    """Two texts in two columns under their names, as lines of at most `width` characters, or 43."""
    column = max(20, (width - 3) // 2)
    blocks = [[name[-column:], "-" * min(column, len(name)),
               *(line for part in text.split("\n") for line in textwrap.wrap(part, column) or [""])]
              for name, text in zip(names, texts)]
    rows = range(max(map(len, blocks)))
    return "\n".join(" | ".join(f"{block[i] if i < len(block) else '':{column}}" for block in blocks).rstrip() for i in rows)


def respond(speakers, question, terminal):
    """Answer on the screen: one model's as it comes, two models' side by side. Whether Ctrl-C ended it."""
    for speaker in speakers:   # a question that is too long for one of them is put to neither, and nothing is printed
        speaker.prompt(question)
    if len(speakers) == 1:
        print("\nAssistant: " if terminal else "", end="", flush=True)
        text, stopped = speakers[0].answer(question, lambda text: print(text, end="", flush=True))
        print((" " * bool(text) + "[stopped]") * stopped, flush=True)   # flush: a pipe's other end waits for the end of the line
    else:
        answers, stopped = [], False
        for speaker in speakers:
            text, stopped = speaker.answer(question) if not stopped else ("", True)   # one Ctrl-C stops both
            answers.append(text + " [stopped]" * stopped)
        width = shutil.get_terminal_size().columns if terminal else 120
        print("\n" * terminal + side_by_side([speaker.name for speaker in speakers], answers, width), flush=True)
    return stopped


def validate(cfg):
    for name, fits, expected in (("temperature", 0 <= cfg.temperature <= 100, "0 to 100"),
                                 ("top_k", cfg.top_k >= 0, "at least 0"),
                                 ("top_p", 0 < cfg.top_p <= 1, "a share above 0, at most 1"),
                                 ("max_new_tokens", cfg.max_new_tokens >= 1, "at least 1"),
                                 ("seed", 0 <= cfg.seed < 2 ** 63, "at least 0 and below 2^63"),
                                 ("prompt", cfg.prompt is None or cfg.prompt.strip(), "a question")):
        if not fits:
            raise InputError(f"--{name.replace('_', '-')}: expected {expected}, found {getattr(cfg, name)!r}")


def main(cfg):
    validate(cfg)
    device, autocast = runs.setup(cfg)
    speakers = [Speaker(cfg, name, device, autocast) for name in (cfg.model, cfg.versus) if name is not None]
    if cfg.prompt is not None:
        if respond(speakers, cfg.prompt.strip(), False):
            raise KeyboardInterrupt
        return
    lines, terminal = iter(sys.stdin or ()), sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        import readline   # noqa: F401   editing and history of what is typed
        print(f"{' and '.join(speaker.name for speaker in speakers)} on {device}. /reset begins anew, /quit ends, Ctrl-C stops "
              "an answer.")
    while True:
        try:
            question = (input("\nHuman: ") if terminal else next(lines)).strip()
            if question == "/quit":
                return
            elif question == "/reset":
                for speaker in speakers:
                    speaker.turns.clear()
                print("a new dialogue" if terminal else "", end="\n" if terminal else "")
            elif question.startswith("/"):
                raise InputError(f"no command {question}: expected /reset or /quit")
            elif question and respond(speakers, question, terminal) and not terminal:
                raise KeyboardInterrupt
        except (EOFError, StopIteration):
            break
        except UnicodeDecodeError as e:
            raise InputError(f"standard input: expected {e.encoding} text ({e.reason})") from None
        except InputError as e:   # the dialogue goes on
            print(f"error: {e}", file=sys.stderr)
        except KeyboardInterrupt:   # what is being typed is dropped
            if not terminal:
                raise
            print()
    if terminal:
        print()


if __name__ == "__main__":
    runs.command_line(main, Config)
