"""Closed-form edits of what a text-to-image model reads of a prompt: UCE (2308.14761) and RECE (2407.12383).

No image is read and nothing is trained: the weights that make keys and values of text tokens are solved for, in double
precision.

# Notation (variable -> papers)
# weights, before -> W, W_old of one projection;  concepts, targets -> c_i of E, v*_i;  preserved -> c_j of P
# erase, preserve, ridge -> erase scale, preserve scale, lambda (of ||W - W_old||^2; in UCE's code 0.5, in RECE's 0.1)
"""

from collections.abc import Sequence
from typing import Annotated, Literal, final

import torch
from annotated_types import MinLen
from jaxtyping import Float
from torch import Tensor

from unlearn_runner.methods.method import Method, Setting
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import NonNegativeFloat, NonNegativeInt, PositiveFloat
from unlearn_runner.types import Batch, Metrics, Stateful, Streams


def edited(
    before: Float[Tensor, "o d"],
    concepts: Float[Tensor, "e d"],
    targets: Float[Tensor, "e o"],
    preserved: Float[Tensor, "p d"],
    erase: float,
    preserve: float,
    ridge: float,
) -> Float[Tensor, "o d"]:
    """The W that minimises erase sum_i ||W c_i - v*_i||^2 + preserve sum_j ||W c_j - W_old c_j||^2 + ridge
    ||W - W_old||^2 (UCE, 2308.14761, equation 7).
    """
    gram = erase * concepts.T @ concepts + preserve * preserved.T @ preserved
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    wanted = erase * targets.T @ concepts + preserve * (before @ preserved.T) @ preserved + ridge * before
    return torch.linalg.solve(gram, wanted, left=False)


def still_says(
    weights: Sequence[Float[Tensor, "_ d"]],
    before: Sequence[Float[Tensor, "_ d"]],
    concepts: Float[Tensor, "e d"],
    ridge: float,
) -> Float[Tensor, "e d"]:
    """The tokens c' that the edited weights W read as the old ones W_old read the concepts: the minimiser of sum over
    projections of ||W c' - W_old c||^2 + ridge ||c'||^2 (RECE, 2407.12383, section 3.2).
    """
    gram = sum(new.T @ new for new in weights) + ridge * torch.eye(concepts.shape[1]).to(concepts)
    wanted = sum(new.T @ old for new, old in zip(weights, before, strict=True)) @ concepts.T
    return torch.linalg.solve(gram, wanted).T


@final
class UCE(Method):
    """Lets the concepts' tokens be read as the anchor's are, and those of other texts as before; one step.

    With `rounds`, RECE: each further round looks for the tokens that still make the concept and edits these, too.

    Args:
        concepts: texts of what is to be forgotten; None: the dataset's forget prompts.
        anchor: the text that they are to be read as.
        preserved: texts that are to be read as before; None: the dataset's retain prompts and the empty one.
        tokens: of a text, "last": that of its last word, as the released code has it; "onwards": all that follow it,
            too, to the end of what the text encoder returns, as that code had it at first. Each is read as the
            anchor's, counted from there.
        erase, preserve, ridge: how much a concept, a preserved text and a weight that moves count.
        rounds: how many times after the first one what still makes the concepts is looked for.
        search_ridge: how much long tokens cost in that.
        again: each of these rounds edits the concepts, too; else what is found alone, as the paper has it [?].
    """

    requires = ("prompts", "base")
    steps = 1
    reads = Streams(retain=None, forget=False)

    def __init__(
        self,
        setting: Setting,
        concepts: Annotated[Sequence[str], MinLen(1)] | None = None,
        anchor: str = "",
        preserved: Sequence[str] | None = None,
        tokens: Literal["last", "onwards"] = "last",
        erase: PositiveFloat = 1.0,
        preserve: NonNegativeFloat = 1.0,
        ridge: PositiveFloat = 0.5,
        rounds: NonNegativeInt = 0,
        search_ridge: PositiveFloat = 0.1,
        again: bool = True,
    ):
        labels = setting.labels
        self.networks = (setting.model,)
        self.concepts = [labels.names[label] for label in labels.forget] if concepts is None else list(concepts)
        self.anchor = anchor
        kept = [labels.names[label] for label in labels.retain] + [""]
        self.preserved = kept if preserved is None else list(preserved)
        self.tokens = tokens
        self.erase, self.preserve, self.ridge = erase, preserve, ridge
        self.rounds, self.search_ridge, self.again = rounds, search_ridge, again

    @property
    def model(self) -> GenerativeModel:
        return self.networks[0]

    @torch.no_grad()
    def step(self, batch: Batch) -> Metrics:
        # 1. the tokens of concepts, anchor and preserved texts
        concepts, anchors = self._pairs()
        preserved = torch.cat([part for text in self.preserved for part in self._tokens_of(text)] or [concepts[:0]])

        # 2. the edit of every projection
        layers = self.model.text_projections()
        before = [layer.weight.double() for layer in layers]
        goals = [anchors @ old.T for old in before]
        weights = [self._edit(old, concepts, goal, preserved) for old, goal in zip(before, goals, strict=True)]

        # 3. RECE: what still makes the concepts is read as the anchor, too
        for _ in range(self.rounds):
            found = still_says(weights, before, concepts, self.search_ridge)
            edited_too = torch.cat([found, concepts]) if self.again else found
            weights = [
                self._edit(new, edited_too, goal.repeat(len(edited_too) // len(goal), 1), preserved)
                for new, goal in zip(weights, goals, strict=True)
            ]
        for layer, new in zip(layers, weights, strict=True):
            layer.weight.copy_(new)
        moved = sum((new - old).square().sum() for new, old in zip(weights, before, strict=True))
        return {"edit/distance": moved.sqrt().float()}

    def _edit(self, weight: Tensor, concepts: Tensor, goal: Tensor, preserved: Tensor) -> Tensor:
        return edited(weight, concepts, goal, preserved, self.erase, self.preserve, self.ridge)

    def _pairs(self) -> tuple[Float[Tensor, "e d"], Float[Tensor, "e d"]]:
        """Tokens to be edited, and what each is to be read as."""
        anchor = self._tokens_of(self.anchor)
        pairs = [
            (part[: len(other)], other[: len(part)])
            for text in self.concepts
            for part, other in zip(self._tokens_of(text), anchor, strict=True)
        ]
        concepts, anchors = zip(*pairs, strict=True)
        return torch.cat(concepts), torch.cat(anchors)

    def _tokens_of(self, text: str) -> list[Float[Tensor, "n d"]]:
        """A text's tokens that count, of each text encoder; of an empty text from its end on."""
        states = self.model.token_states([text])[0].double()
        rows = self.model.last_tokens(text)
        return [states[first : first + 1 if self.tokens == "last" else end] for first, end in rows]

    def stateful(self) -> dict[str, Stateful]:
        return {"weights": self.model}
