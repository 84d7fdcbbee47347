"""What a text-to-image network reads of prompts: tokenizers and text encoders, as diffusers' pipelines use them."""

import copy
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unlearn_runner.errors import ConfigurationError, first_line
from unlearn_runner.models.diffusion import Part
from unlearn_runner.models.loading import json_in, reading_part
from unlearn_runner.models.model import Condition

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

END = "</w>"  # CLIP's mark of a word's last piece


class Word(NamedTuple):
    """A text that the first text encoder reads as one token."""

    text: str
    token: int


@final
class Spelling:
    """How texts become token numbers for one text encoder."""

    def __init__(self, tokenizer: Any, most: int):
        self.tokenizer = copy.deepcopy(tokenizer)  # calls leave traces in what it saves
        self.length = min(tokenizer.model_max_length, most)

    def ids(self, texts: Sequence[str]) -> Int64[Tensor, "n s"]:
        """What is read of the texts. It is said which are longer than that."""
        whole = self.tokenizer(list(texts), truncation=False, padding=False, verbose=False).input_ids
        cut = [f"'{text}'" for text, row in zip(texts, whole, strict=True) if len(row) > self.length]
        if cut:
            _say(f"only the first {self.length} tokens of a prompt are read; these are longer: {', '.join(cut)}")
        padded = {"padding": "max_length", "max_length": self.length, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(list(texts), **padded).input_ids

    def count(self, text: str) -> int:
        """How many tokens of a text are read, its start and its end among them."""
        return min(len(self.tokenizer(text, truncation=False, padding=False, verbose=False).input_ids), self.length)


class Texts(Part):
    """Tokenizers and text encoders. All tensors of one prompt are packed into one, [s, d], which is what a condition is
    to methods: they average, learn and exchange it as a whole.
    """

    t5_tokens = 0  # of one text that a T5 reads, which has no bound of its own
    stays = False  # where it is, in the precision that it has, wherever the model goes
    _spellings: list[Spelling] | None = None  # made at first use, and anew with other tokenizers

    def train(self, mode: bool = True) -> "Texts":
        """Without dropout always, which T5 has: a prompt is one condition, whoever asks for it and when."""
        return super().train(False)

    def stay(self) -> None:
        """On the CPU, whatever device the model is moved to from now on."""
        self.to("cpu")
        self.stays = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Texts":
        return self if self.stays else super()._apply(fn, recurse)

    @abstractmethod
    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "n s d"]:
        """What the network receives of any texts, packed."""

    @abstractmethod
    def empty(self) -> Float[Tensor, "1 s d"]:
        """What guidance leads away from, packed."""

    @abstractmethod
    def condition(self, packed: Float[Tensor, "b s d"]) -> Condition:
        """What `embed` packed, as the network takes it."""

    @property
    @abstractmethod
    def encoders(self) -> dict[str, tuple["CLIPTokenizer", nn.Module]]:
        """Each text encoder with its tokenizer, by the encoder's name in a pipeline's folder."""

    @abstractmethod
    def pipeline(self) -> type["DiffusionPipeline"]:
        """diffusers' pipeline of a network that reads these."""

    @property
    @abstractmethod
    def pipeline_options(self) -> dict[str, Any]:
        """What that pipeline is made with besides its parts."""

    @abstractmethod
    def last_tokens(self, text: str) -> list[tuple[int, int]]:
        """The rows of a text's tokens that hold its last word, and where those of the same text encoder end."""

    def spellings(self) -> list[Spelling]:
        """Of each tokenizer."""
        if self._spellings is None:
            self._spellings = [
                Spelling(tokenizer, getattr(encoder.config, "max_position_embeddings", self.t5_tokens))
                for tokenizer, encoder in self.encoders.values()
            ]
        return self._spellings

    def ids(self, prompts: Sequence[str]) -> list[Int64[Tensor, "n s"]]:
        """What each text encoder reads of texts. It is said which are cut, and which read the same."""
        return list(self.tokens(prompts).split([spelling.length for spelling in self.spellings()], 1))

    def tokens(self, prompts: Sequence[str]) -> Int64[Tensor, "n s"]:
        """All that is read of texts, by which they differ. It is said which are cut, and which read the same."""
        rows = torch.cat([spelling.ids(prompts) for spelling in self.spellings()], 1)
        alike: dict[tuple[int, ...], set[str]] = {}
        for text, row in zip(prompts, rows.tolist(), strict=True):
            alike.setdefault(tuple(row), set()).add(text)
        for same in alike.values():
            if len(same) > 1:
                _say(f"these prompts are one condition to the text encoder: {', '.join(map(repr, sorted(same)))}")
        return rows

    def words(self) -> list[Word]:
        """What of the vocabulary, of letters and digits, is read as it is written at the beginning of a text."""
        tokenizer = self.spellings()[0].tokenizer
        texts = [tokenizer.decode([token]).replace(END, "").strip() for token in range(len(tokenizer))]
        read = tokenizer([f"{text} a" for text in texts], truncation=False, padding=False, verbose=False).input_ids
        (alone,) = {row[2] for row in tokenizer(["a a"], truncation=False, padding=False).input_ids}
        special = set(tokenizer.all_special_ids)
        return [
            Word(text, token)
            for token, (text, row) in enumerate(zip(texts, read, strict=True))
            if token not in special and text.isalnum() and row[1:3] == [token, alone]
        ]

    def slopes(
        self, text: str, count: int, cost: Callable[[Float[Tensor, "1 s d"]], Float[Tensor, ""]]
    ) -> Float[Tensor, "{count} v"]:
        """By how much, to first order, a cost of the packed text changes when each of its first `count` tokens is
        exchanged for each of the first encoder's vocabulary, as that encoder reads them (HotFlip, 1712.06751).
        """
        encoder = next(iter(self.networks.values()))
        table = encoder.get_input_embeddings()
        found: list[Tensor] = []

        def noted(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            found.append(output.detach().requires_grad_())
            return found[0]

        hook = table.register_forward_hook(noted)
        try:
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(cost(self.embed([text]).float()), [found[0]])
        finally:
            hook.remove()
        places = slice(1, 1 + count)  # after the start of the text
        along = gradient[0, places]
        weights = table.weight.detach()
        return along @ weights.T - (along * found[0].detach()[0, places]).sum(1, keepdim=True)

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {name: encoder for name, (_, encoder) in self.encoders.items()}

    @property
    def components(self) -> dict[str, Any]:
        tokenizers = {tokenizer_of(name): tokenizer for name, (tokenizer, _) in self.encoders.items()}
        return {**self.networks, **tokenizers}

    def require(self, folder: Path) -> None:
        """Raise ConfigurationError if there are tokens in a folder's vocabulary that a text encoder does not know."""
        keep_libraries_quiet()
        for name, (tokenizer, encoder) in self.encoders.items():
            with reading_part(tokenizer_of(name)):
                require_vocabulary(tokenizer_in(folder, tokenizer_of(name), type(tokenizer).__name__), encoder)

    def take(self, folder: Path) -> None:
        for name, (tokenizer, _) in self.encoders.items():
            setattr(self, tokenizer_of(name), tokenizer_in(folder, tokenizer_of(name), type(tokenizer).__name__))
        self._spellings = None


@final
class ClipTexts(Texts):
    """Stable Diffusion's: the last hidden states of one CLIP text encoder."""

    def __init__(self, tokenizer: "CLIPTokenizer", text_encoder: "CLIPTextModel"):
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "n s d"]:
        ids = self.tokens(prompts).to(self.text_encoder.device)
        return self.text_encoder(ids, return_dict=False)[0]

    def last_tokens(self, text: str) -> list[tuple[int, int]]:
        return [last_of_clip(self.spellings()[0], text)]

    def empty(self) -> Float[Tensor, "1 s d"]:
        return self.embed([""])

    def condition(self, packed: Float[Tensor, "b s d"]) -> Condition:
        return Condition(tokens=packed)

    @property
    def encoders(self) -> dict[str, tuple["CLIPTokenizer", nn.Module]]:
        return {"text_encoder": (self.tokenizer, self.text_encoder)}

    def pipeline(self) -> type["DiffusionPipeline"]:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """There is no safety checker."""
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@final
class ClipPair(Texts):
    """SDXL's (2307.01952): the last hidden states but one of two CLIP text encoders side by side, the second's pooled
    projection, and the size of the picture, which is drawn whole.

    Args:
        zeros_for_empty: what guidance leads away from is zeros, as SDXL's pipeline has it, instead of the prompt "".
    """

    def __init__(
        self,
        tokenizer: "CLIPTokenizer",
        text_encoder: "CLIPTextModel",
        tokenizer_2: "CLIPTokenizer",
        text_encoder_2: "CLIPTextModelWithProjection",
        size: tuple[int, int],
        zeros_for_empty: bool = True,
    ):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        self.size, self.zeros_for_empty = size, zeros_for_empty

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "n s d"]:
        states = []
        for ids, encoder in zip(self.ids(prompts), self.networks.values(), strict=True):
            found = encoder(ids.to(encoder.device), output_hidden_states=True)
            states.append(found.hidden_states[-2])
        tokens = torch.cat(states, 2)
        return with_pooled(tokens, found.text_embeds)

    def last_tokens(self, text: str) -> list[tuple[int, int]]:
        """The two encoders' states lie side by side."""
        return [last_of_clip(self.spellings()[0], text)]

    def empty(self) -> Float[Tensor, "1 s d"]:
        embedding = self.embed([""])
        return torch.zeros_like(embedding) if self.zeros_for_empty else embedding

    def condition(self, packed: Float[Tensor, "b s d"]) -> Condition:
        height, width = self.size
        sizes = packed.new_tensor([height, width, 0, 0, height, width])  # original, no crop, target
        pooled = packed[:, -1, : self.text_encoder_2.config.projection_dim]
        return Condition(tokens=packed[:, :-1], pooled=pooled, sizes=sizes.expand(len(packed), 6))

    @property
    def encoders(self) -> dict[str, tuple["CLIPTokenizer", nn.Module]]:
        return {
            "text_encoder": (self.tokenizer, self.text_encoder),
            "text_encoder_2": (self.tokenizer_2, self.text_encoder_2),
        }

    def pipeline(self) -> type["DiffusionPipeline"]:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.zeros_for_empty, "add_watermarker": False}

    def take(self, folder: Path) -> None:
        super().take(folder)
        self.zeros_for_empty = bool(json_in(folder / "model_index.json").get("force_zeros_for_empty_prompt", True))


def last_of_clip(spelling: Spelling, text: str) -> tuple[int, int]:
    """`Texts.last_tokens` of one CLIP; of an empty text its end."""
    return max(1, spelling.count(text) - 2), spelling.length


def last_of_t5(spelling: Spelling, text: str) -> tuple[int, int]:
    """`Texts.last_tokens` of T5, which marks no start; of an empty text its end."""
    return max(0, spelling.count(text) - 2), spelling.length


def with_pooled(tokens: Float[Tensor, "n s d"], pooled: Float[Tensor, "n e"]) -> Float[Tensor, "n t d"]:
    """Packed: the pooled text is a row after those of the tokens, filled up with zeros; e is at most d."""
    return torch.cat([tokens, nn.functional.pad(pooled, (0, tokens.shape[2] - pooled.shape[1]))[:, None]], 1)


def tokenizer_of(encoder: str) -> str:
    """The name in a pipeline's folder of the tokenizer of a text encoder: tokenizer_2 of text_encoder_2."""
    return encoder.replace("text_encoder", "tokenizer")


def tokenizer_in(folder: Path, name: str = "tokenizer", kind: str = "CLIPTokenizer") -> Any:
    """A tokenizer of a pipeline, of a kind of transformers', which builds one of a few tokens where it finds no
    vocabulary.
    """
    import transformers

    json_in(folder / name / "tokenizer_config.json")
    try:
        tokenizer = getattr(transformers, kind).from_pretrained(folder / name)
    except Exception as error:
        raise ConfigurationError(f"the vocabulary in {folder / name} is damaged ({first_line(error)})") from error
    if len(tokenizer) < (256 if kind == "CLIPTokenizer" else 110):  # of CLIP's the bytes alone are as many
        raise ConfigurationError("the tokenizer's vocabulary is not there")
    return tokenizer


def require_vocabulary(tokenizer: "CLIPTokenizer", text_encoder: "CLIPTextModel") -> None:
    """Raise ConfigurationError if there are tokens that the text encoder has no embedding for."""
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise ConfigurationError(
            f"its tokenizer knows {len(tokenizer)} tokens, its text encoder {text_encoder.config.vocab_size}."
        )


def build_tokenizer(words: Sequence[str], max_length: int) -> "CLIPTokenizer":
    """CLIPTokenizer that knows any text byte by byte, and `words` (ASCII letters) mostly as one token each.

    Each word's merges put it together from the left: s e, se v, sev e, seve n</w>. A merge of an earlier word may cut
    a later one into more pieces, which is as good a spelling as any.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + END for letter in alphabet)]
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({part.lower() for given in words for part in given.split()}):
        *letters, last = word
        left = ""
        for piece in (*letters, last + END):
            if left:
                merges[left, piece] = None
                pieces.append(left + piece)
            left += piece
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=max_length)


def build_text_encoder(tokenizer: "CLIPTokenizer", width: int, layers: int, projected: bool = False) -> nn.Module:
    """A small CLIPTextModel with fresh weights; `projected`: with the projection of a pooled text, which is as wide."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@lru_cache
def _say(message: str) -> None:
    """Once, on standard error: a run builds its model several times."""
    logging.getLogger(__name__).warning(message)


def keep_libraries_quiet() -> None:
    """No bars for files of a second, and none of the hub's retries: what went wrong is said in one sentence."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
