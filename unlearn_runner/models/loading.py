"""Networks and schedules out of folders as diffusers writes them: config files and safetensors, no code, no pickle.

Headers say which tensors a file holds, so that weights which do not fit are refused before any is read.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unlearn_runner.errors import ConfigurationError, first_line
from unlearn_runner.models.path import Straight, is_flow, training_schedule
from unlearn_runner.weights import Stored, fetched, located, stored_tensors

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

DTYPES = ("F64", "F32", "F16", "BF16")  # read, into the network's own; others are quantised
OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
FORMER_KINDS = {"DiTTransformer2DModel": "Transformer2DModel"}  # what diffusers called it before 0.28
PREFIX = "text_model."  # which transformers 4 puts before the names of CLIP's text encoder, and 5 does not
BESIDE = ("position_ids", "text_projection.weight", "visual_projection.weight", "logit_scale")  # of a whole CLIP
NOT_ARCHITECTURE = ("dropout", "scaling_factor", "shift_factor", "force_upcast")  # of the same weights
TEXT_ARCHITECTURE = (  # what the shapes of weights do not tell, of CLIP's and of T5's
    *("hidden_act", "num_attention_heads", "layer_norm_eps"),
    *("feed_forward_proj", "num_heads", "layer_norm_epsilon", "relative_attention_max_distance"),
)
BASES_ARCHITECTURE = "a model of the base's architecture, its folder or a hub id that can be reached"


@contextmanager
def reading(option: str, source: str | Path, expected: str) -> Iterator[None]:
    """Whatever goes wrong in here, in the libraries, the hub's client or its HTTP library, becomes one sentence.

    Raises ConfigurationError, naming the option to change, what was expected there, and what came.
    """
    try:
        yield
    except Exception as error:
        raise ConfigurationError(f"{option}={source}: expected {expected}; {first_line(error)}") from error


@contextmanager
def reading_part(name: str) -> Iterator[None]:
    """Whatever goes wrong in here names the part of the pipeline that it is about."""
    try:
        yield
    except Exception as error:
        raise ConfigurationError(f"{name} could not be read: {first_line(error)}") from error


def part_of(folder: Path, name: str) -> Path:
    """Where a pipeline keeps a part; a network saved alone, as google/ddpm-* on the hub, has it at the top."""
    inner = folder / name
    return inner if inner.is_dir() else folder


def network_in(kind: Any, folder: Path) -> Any:
    """The network of diffusers' that a folder's config describes, its weights zeros until others are read.

    Raises ConfigurationError if it describes another kind.
    """
    require_kind(folder, json_in(folder / "config.json").get("_class_name"), kind.__name__)
    return without_weights(lambda: kind.from_config(kind.load_config(folder)))


def without_weights(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that `make` makes, with zeros for weights, and its buffers as ever.

    To draw first weights, which others replace, takes minutes of a large network, and memory; zeros take none until
    they are written to.
    """
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        module = make()
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and weight.is_meta:
                zeros = torch.zeros(weight.shape, dtype=weight.dtype)
                part._parameters[name] = nn.Parameter(zeros, weight.requires_grad)
    if hasattr(module, "tie_weights"):  # transformers', two names of one tensor
        module.tie_weights()
    return module


def json_in(file: Path) -> dict[str, Any]:
    """What a config file says. Raises ConfigurationError if it is not there, where the libraries would ask the hub for
    it, or says nothing.
    """
    if not file.is_file():
        raise ConfigurationError(f"there is no {file}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{file} is not JSON ({error}).") from error
    if not isinstance(content, dict) or not content:
        raise ConfigurationError(f"{file} holds no settings.")
    return content


def require_kind(folder: Path, found: str | None, expected: str) -> None:
    """Raise ConfigurationError if a config names another class than the one that would be built of it."""
    if found not in (None, expected, FORMER_KINDS.get(expected)):
        raise ConfigurationError(f"{folder} holds a {found}, and only a {expected} can be read there.")


def require_channels(unet: nn.Module, channels: int) -> None:
    """Raise ConfigurationError unless a UNet sees noisy samples of so many channels, and predicts as many."""
    into, out = unet.config.in_channels, unet.config.out_channels
    if into > channels:
        raise ConfigurationError(
            f"its UNet sees {into} channels, the noisy samples have {channels}: one that is also shown a mask or a "
            "picture (inpainting, depth, editing) cannot be unlearned here."
        )
    if into < channels or out < channels:
        raise ConfigurationError(f"its UNet turns {into} channels into {out}, the noisy samples have {channels}.")
    if out > channels:
        raise ConfigurationError(
            f"its UNet predicts {out} channels for {channels}: one that learnt the variance of its steps, too, cannot "
            "be unlearned here."
        )


def scheduler_in(folder: Path, flows: bool = False) -> "SchedulerMixin":
    """The scheduler of a pipeline or of a network saved alone, in its own class.

    Raises ConfigurationError if it is not one of diffusers' for a schedule of alphas_cumprod, which noise is added by,
    or, where there may be `flows`, for a straight path.
    """
    import diffusers
    from diffusers import SchedulerMixin

    place = part_of(folder, "scheduler")
    config = json_in(place / "scheduler_config.json")
    name = _named_by_pipeline(folder) or config.get("_class_name")
    kind = getattr(diffusers, name or "DDPMScheduler", None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ConfigurationError(f"{place}: diffusers has no scheduler called {name}.")
    scheduler = kind.from_pretrained(place)
    if flows and is_flow(scheduler):
        return _straight(scheduler, place)
    own, flow = getattr(scheduler, "alphas_cumprod", None), scheduler.config.get("use_flow_sigmas", False)
    if own is None or flow or not torch.allclose(training_schedule(scheduler), own, atol=1e-6):
        raise ConfigurationError(
            f"{place} holds a {name}, whose noise is not that of a diffusion model with alphas_cumprod"
            f"{'' if flows else ', and this network is known on no flow'}."
        )
    if not bool(((own >= 0) & (own <= 1)).all()) or len(own) < 2 or own[-1] >= own[0]:
        raise ConfigurationError(f"{place} describes no schedule on which the noise grows from step to step.")
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        raise ConfigurationError(f"{place} asks for a learnt variance, which the network does not predict.")
    return scheduler


def _straight(scheduler: "SchedulerMixin", place: Path) -> "SchedulerMixin":
    """Raise ConfigurationError unless a flow's scheduler trains and draws on `Straight`, shifted or not."""
    every = torch.arange(scheduler.config.num_train_timesteps)
    shift = 1.0 if scheduler.config.use_dynamic_shifting else float(scheduler.config.shift)
    own = Straight(len(every), shift).amplitudes(every).std.flatten()
    bent = ("invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas")
    options = [name for name in (*bent, "use_beta_sigmas") if scheduler.config.get(name)]
    if options or len(every) < 2 or not torch.allclose(scheduler.sigmas.flip(0), own, atol=1e-6):
        why = ", ".join(options) or f"shift={scheduler.config.shift}, num_train_timesteps={len(every)}"
        raise ConfigurationError(f"{place} holds a flow's scheduler whose times are not known here ({why}).")
    return scheduler


def check_weights(networks: Mapping[str, nn.Module], folder: Path) -> None:
    """Raise ConfigurationError if a folder does not hold the weights of these networks, each in its part. By the files'
    headers: no tensor is read.
    """
    for name, network in networks.items():
        with reading_part(name):
            _tensors_of(network, part_of(folder, name))


def fitting(networks: Mapping[str, nn.Module], source: str | Path, option: str) -> Path:
    """The folder that `source` is, or that it is fetched into, if it holds these networks: `check_weights`, and the
    architecture that its config describes.
    """
    folder = fetched(located(str(source), option), weights=True)
    check_architecture(networks, folder)
    check_weights(networks, folder)
    return folder


def check_architecture(networks: Mapping[str, nn.Module], folder: Path) -> None:
    """Raise ConfigurationError if a config in a folder describes another network than the one of that part."""
    for name, network in networks.items():
        with reading_part(name):
            _require_architecture(network, part_of(folder, name))


def load_weights(networks: Mapping[str, nn.Module], folder: Path) -> None:
    """Take over what `check_weights` finds, tensor by tensor, each in the network's own precision."""
    from safetensors import safe_open

    for name, network in networks.items():
        found = _tensors_of(network, part_of(folder, name))
        weights = network.state_dict()
        for file in sorted({stored.file for stored, _ in found.values()}):
            with safe_open(file, "pt") as tensors, torch.no_grad():
                for own, (stored, spelt) in found.items():
                    if stored.file == file:
                        weights[own].copy_(tensors.get_tensor(spelt))


def _tensors_of(network: nn.Module, folder: Path) -> dict[str, tuple[Stored, str]]:
    """Where each of a network's tensors lies, and its name there; those of LoRA's additions are nowhere."""
    there = stored_tensors(folder)
    own = {name: value for name, value in network.state_dict().items() if ".lora_" not in name}
    found = {}
    for name, value in own.items():
        spelt = next((spelling for spelling in spellings(name.replace(".base_layer", "")) if spelling in there), None)
        if spelt is not None:
            found[name] = (there[spelt], spelt)
            file, shape, dtype = there[spelt]
            if shape != tuple(value.shape):
                raise ConfigurationError(
                    f"{file} holds {spelt} in the shape {shape}, and the network has it in {tuple(value.shape)}."
                )
            if dtype not in DTYPES:
                raise ConfigurationError(
                    f"{file} holds {spelt} as {dtype}; weights are read in 16, 32 or 64 bits, not quantised."
                )
    read = {own[name].data_ptr() for name in found}  # a tensor that the network has under two names is stored once
    lacking = [name for name in own if name not in found and own[name].data_ptr() not in read]
    taken = {spelt for _, spelt in found.values()}
    left = [name for name in there if name not in taken and not name.endswith(BESIDE) and "vision_model." not in name]
    if lacking or left:
        examples = f"no {lacking[0]}" if lacking else f"{left[0]}, which the network does not have"
        raise ConfigurationError(
            f"{folder} holds the weights of another network: {examples} ({len(lacking)} of {len(own)} are missing, "
            f"{len(left)} are left over)."
        )
    return found


def spellings(name: str) -> Iterator[str]:
    """Names that older versions of the libraries have saved a tensor under."""
    for old in (name, PREFIX + name, name.removeprefix(PREFIX)):
        yield old
    for new, old in OLD_NAMES.items():
        if new in name:
            yield name.replace(new, old)


def _require_architecture(network: nn.Module, folder: Path) -> None:
    """Raise ConfigurationError if a folder's config describes another network: not all of it shows in the shapes."""
    from diffusers import ConfigMixin, UNet2DModel

    if isinstance(network, ConfigMixin):
        with torch.device("meta"):
            there = network_in(type(network), folder).config
        # a latent's size is chosen by who draws, that of pixels belongs to the model
        apart = NOT_ARCHITECTURE if isinstance(network, UNet2DModel) else (*NOT_ARCHITECTURE, "sample_size")
        names = [name for name in network.config if not name.startswith("_") and name not in apart]
    else:
        json_in(folder / "config.json")
        there = type(network.config).from_pretrained(folder).to_dict()
        names = [name for name in TEXT_ARCHITECTURE if name in there]
    for name in names:
        own = getattr(network.config, name)
        if _comparable(there.get(name)) != _comparable(own):
            raise ConfigurationError(f"{folder} describes another network: {name} is {there.get(name)}, not {own}.")


def _comparable(value: Any) -> Any:
    """A list as a tuple; of two equal numbers, the sides of a square, the one."""
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 2 and value[0] == value[1] else tuple(value)
    return value


def _named_by_pipeline(folder: Path) -> str | None:
    index = folder / "model_index.json"
    entry = json_in(index).get("scheduler") if index.is_file() else None
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    return name if library in (None, "diffusers") else f"{library}.{name}"
