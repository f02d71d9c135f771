import weakref

import engine.arena
from engine.kv_cache import KVCache
from engine.sampling import SamplingParams
from models import hf_model, our_engine


def test_an_arena_is_given_back_before_a_larger_one_takes_its_place(monkeypatch):
    """The second wave needs more room than the first, of which nothing is left: two arenas would take twice as much."""
    alive, num_made = weakref.WeakSet(), 0

    class Counted(KVCache):
        def __init__(self, *args):
            nonlocal num_made
            assert len(alive) == 0, "the arena before is still there"
            super().__init__(*args)
            alive.add(self)
            num_made += 1

    monkeypatch.setattr(engine.arena, "KVCache", Counted)
    ours = our_engine(hf_model(), max_batch_size=1)
    for method in ("hydragen", "hydragen_noshared"):
        ours.release_caches()
        ours.generate([[1], [2] * 50], SamplingParams(temperature=0, max_tokens=3), attention=method)
    assert num_made == 4
