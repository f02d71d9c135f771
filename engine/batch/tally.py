"""What has become of a batch."""

from dataclasses import dataclass


@dataclass
class Tally:
    """Counted as it runs. Requests are those of the whole file, tokens and seconds those of this run."""

    num_requests: int  # those that cannot be served included
    num_resumed: int = 0  # had a result before this run
    num_finished: int = 0  # have one now
    num_failed: int = 0  # of these
    num_unserved: int = 0  # ran, but could not be answered: they have no result
    first_unserved: str = ""  # which of them was the first, and why
    prompt_tokens: int = 0  # of requests that were answered
    new_tokens: int = 0  # those of requests under way included
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0
