"""What one may choose when a probe is fitted."""

from pydantic import Field

from spider_sense.config import Settings

__all__ = ["FitOptions"]


class FitOptions(Settings):
    """Options of every family; a family ignores those that it has no use for, logistic and mass_mean all of them."""

    epochs: int = Field(default=3, ge=1)
    """Passes over the conversations; longer training overfits slowly."""
    learning_rate: float = Field(default=0.01, gt=0)
    """Peak of the one-cycle schedule."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW's, on matrices only."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Share of the features of every token that is zeroed, rounded to 1/256."""
    parts: int = Field(default=4, ge=1)
    """Values per token of attention, multimax and rolling_attention."""
    hidden: int = Field(default=64, ge=1)
    """Hidden units of mlp."""
    window: int = Field(default=16, ge=1)
    """Tokens in a training window of swim and topk."""
    top_k: int = Field(default=8, ge=1)
    """Windows that topk averages."""
    alpha: float = Field(default=0.1, gt=0, le=1)
    """Weight of the newest token in the moving average that reads swim and topk."""
    batch: int = Field(default=64, ge=1)
    """Conversations in a step."""
    seed: int = Field(default=0, ge=0)
