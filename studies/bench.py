"""
How fast is it? Ratios within one run, since a machine's speed drifts.

    python -m studies.bench optim       # one step of each optimizer at 124M parameters, against torch's fused AdamW
"""
import argparse
import random
import statistics
import time

import torch

import model as gpt
import optim


def optim_steps(name="gpt2", rounds=25):
    """Rounds of one step() of every optimizer in turn, on the same weights with the same gradients (fp32). Prints the median and
    the range over rounds of each one's time over that of torch's fused AdamW in the same round, and its state's bytes."""
    model = gpt.GPT(gpt.SIZES[name])
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 0.01
    K, numbers = 8, sum(p.numel() for p in model.parameters())
    compared = {"adamw": optim.make("adamw", model, 1e-6, None, 0.1)}
    compared["adamw, torch's foreach"] = torch.optim.AdamW(optim.parameter_groups(model, 0.1), 1e-6, (0.9, 0.99), foreach=True)
    compared |= {key: optim.make(key, model, 1e-6, None, 0.1, K) for key in ("adamw-pma", "agma", "lion", "lion-pma")}
    took = {key: [] for key in compared}
    for turn in range(rounds + 1):   # the first allocates the state
        for key in random.Random(turn).sample(list(compared), len(compared)):   # who follows whom should not matter
            optimizer = compared[key]
            start = time.perf_counter()
            optimizer.step()
            if turn:
                took[key].append(time.perf_counter() - start)
    print(f"{name}, {numbers / 1e6:.0f}M parameters, {torch.get_num_threads()} threads, K = {K}: one step, {rounds} rounds\n")
    print("| | ms, median | times torch's fused AdamW: median [range] | bytes of state a parameter |\n| --- | --- | --- | --- |")
    for key, optimizer in compared.items():
        ratios = [a / b for a, b in zip(took[key], took["adamw"])]
        state = sum(x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x))
        print(f"| {key} | {1000 * statistics.median(took[key]):.0f} | {statistics.median(ratios):.2f} [{min(ratios):.2f}, "
              f"{max(ratios):.2f}] | {state / numbers:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["optim"])
    parser.parse_args()
    optim_steps()
