"""The program of one process of a gloo group; ``tests/engine/test_distributed.py`` starts it. Arguments: a folder for
the results, and for each group to join its number of ranks, its port and how tensors go (``memory`` that ranks share,
or ``gloo``), as in ``4:29500:memory``. A rank beyond a group's size sits it out.
"""

import os
import sys
from pathlib import Path

import torch

from engine.config import ModelConfig
from engine.distributed import TPGroup, init_group
from engine.dummy import dummy_tensor
from engine.engine import Engine, Levels
from engine.errors import InputError
from engine.host_exchange import HostExchange
from engine.model import Transformer
from engine.sampling import SamplingParams

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 131,  # divides over neither 2 nor 4 ranks
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # replicated on 4 ranks
    "head_dim": 16,
    "attention_bias": True,
    "max_position_embeddings": 128,
    "eos_token_id": 7,
}
ROOT = [9, 8, 7, 100, 101, 102, 3]
PROMPTS = [[*ROOT, 1, 2], ROOT, [*ROOT, 1, 2, 4, 4, 4], [130, 129], [*ROOT, 50]]
LEVELS = Levels([[ROOT, [5]], [[1], [2], [], []], [[1]] * 8])


def make_engine(group: TPGroup) -> Engine:
    config = ModelConfig.from_hf(CONFIG)
    model = Transformer(config, group)
    for slot in model.weight_slots():
        slot.target.copy_(slot.shard.cut(dummy_tensor(slot.shard.name, slot.shard.full_shape, torch.float32)))
    return Engine(model, eos_token_ids=config.eos_token_ids)


def generate(engine: Engine) -> dict:
    """Everything that must not depend on the number of ranks: tokens, ends, log-probabilities and logits by case."""
    greedy = SamplingParams(temperature=0, max_tokens=6, logprobs=0)
    drawn = [
        SamplingParams(n=3, max_tokens=6),
        SamplingParams(top_k=5, max_tokens=4),
        greedy,
        SamplingParams(n=2, top_p=0.9, max_tokens=6),
        SamplingParams(n=2, seed=4, max_tokens=9, ignore_eos=True),
    ]
    cases = {}
    for method in ("hydragen", "hydragen_noshared", "noattention"):
        options = {"attention": method, "return_logits": True}
        cases[f"{method} greedy"] = engine.generate(PROMPTS, greedy, **options)
        cases[f"{method} drawn"] = engine.generate(PROMPTS, drawn, **options)
        cases[f"{method} levels"] = engine.generate(LEVELS, greedy, **options)
    engine.append_shared([ROOT])
    engine.max_batch_size = 2
    cases["kept"] = engine.generate([[1], [], [2]], greedy, shared_cache_op="preserve", return_logits=True)
    engine.empty_shared()
    assert engine.arena.num_used == 0
    return {
        name: [
            (r.token_ids, r.finish_reason, r.logprobs, torch.stack(r.logits)) for samples in results for r in samples
        ]
        for name, results in cases.items()
    }


def check_collectives(group: TPGroup) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        ones = torch.full((3,), float(group.rank + 1), dtype=dtype)
        assert group.all_reduce(ones) is ones and ones.tolist() == [sum(range(1, group.size + 1))] * 3
    large = torch.arange(600_000.0) * (group.rank + 1)
    assert torch.equal(group.all_reduce(large), torch.arange(600_000.0) * sum(range(1, group.size + 1)))
    strided = torch.arange(6).view(2, 3).T + 10 * group.rank
    gathered = group.all_gather(strided)
    assert gathered.shape == (group.size, 3, 2)
    assert all(torch.equal(part, torch.arange(6).view(2, 3).T + 10 * rank) for rank, part in enumerate(gathered))
    assert group.broadcast({"rank": group.rank}) == {"rank": 0}
    assert group.gather_objects(("rank", group.rank)) == [("rank", rank) for rank in range(group.size)]
    group.barrier()


def check_joined_once() -> None:
    try:
        init_group("cpu")
    except InputError as error:
        assert "accepted: one group in a process" in str(error)
    else:
        raise AssertionError("joined twice")


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    join = HostExchange.join
    for described in sys.argv[2:]:
        size, port, way = described.split(":")
        if int(os.environ["RANK"]) >= int(size):
            continue
        os.environ |= {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        HostExchange.join = join if way == "memory" else lambda *_: None
        group = init_group("cpu", timeout_s=60)
        assert (group._host is not None) == (way == "memory")
        check_joined_once()
        check_collectives(group)
        engine = make_engine(group)
        results = {"cases": generate(engine), "max_tokens": engine.arena.max_tokens, "size": group.size}
        torch.save(results, folder / f"{size}-{way}-{group.rank}.pt")
        group.close()


if __name__ == "__main__":
    main()
