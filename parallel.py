"""
One run on several processes: torchrun --standalone --nproc-per-node N train_sft.py ...

N processes with micro-batch b take the steps of one process with micro-batch N b. Each takes every N-th row of a micro-batch and
divides its sums by the tokens or pairs of all, so that the sum over processes of losses and of gradients is the whole's. The
weights start equal, see equal gradients and stay equal. Process 0 alone evaluates and writes.

PMA and AGMA need the summed gradient after every micro-batch, accumulation only after the last of a step: at K micro-batches K
times as much goes over the wire.

Without torchrun there is one process, and nothing here does anything: mine(rows) is all rows, total(x) is (x,).
"""
import datetime
import os
import re
import textwrap

import torch
import torch.distributed as dist

from files import InputError

PATIENCE = datetime.timedelta(hours=4)   # others wait for as long as an evaluation takes; a process that dies is seen at once


def join():
    """Meet the other processes, if torchrun has started us."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as e:
            raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the other processes cannot be met: start them with "
                             f"torchrun ({shortened(e)})") from None


def leave():
    wait()   # torchrun ends them all when one has ended: not before the first one has written what it has to write
    if dist.is_initialized():
        dist.destroy_process_group()


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank():
    """Which of its machine's processes this is: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _together(call, *arguments, **options):
    """A call that needs all processes. torch says in many ways that one of them has gone."""
    try:
        return call(*arguments, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:
        raise InputError(f"another process of this run has ended, or cannot be reached ({shortened(e)}); go on with "
                         "--resume") from None


def shortened(e):
    """An error of torch's in a few words, without the place in its source."""
    return textwrap.shorten(re.sub(r"^\[.*?\] *", "", str(e)), 100, placeholder=" ...")


def mine(rows):
    """This process' share of a micro-batch; the last ones may have a row less, or none."""
    return rows[rank()::size()]


def total(*numbers):
    """Each number's sum over all processes."""
    if size() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    _together(dist.all_reduce, sums)
    return tuple(type(number)(x) for number, x in zip(numbers, sums.tolist()))


def any_of(flag):
    return total(int(flag))[0] > 0


def sum_gradients(gradients):
    """Tensors become their sums over all processes, in place."""
    if size() > 1:
        for work in [_together(dist.all_reduce, g, async_op=True) for g in gradients]:
            _together(work.wait)


def start_equal(model, **facts):
    """Every process gets process 0's weights; a run on other data is refused."""
    if size() == 1:
        return
    said = [str(fact).encode() for fact in facts.values()]
    for name, found in zip(facts, said):
        first = gathered(torch.tensor(list(found), dtype=torch.uint8))[0]
        if bytes(first.tolist()) != found:
            raise InputError(f"its {name} is not that of process 0")
    for t in model.state_dict().values():
        _together(dist.broadcast, t, 0)


def gathered(tensor):
    """The tensors, equal in size, of all processes."""
    if size() == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(size())]
    _together(dist.all_gather, found, tensor)
    return found


def wait():
    """Until all are here."""
    if size() > 1:
        _together(dist.barrier)


def in_turn(work):
    """One process after the other: what the first leaves on disk the others find there."""
    for turn in range(size()):
        if turn == rank():
            work()
        wait()
