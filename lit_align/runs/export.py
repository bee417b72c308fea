"""Folders of exported weights: where they are, their stop ids, and what is removed from them."""

from copy import deepcopy
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lit_align.data.base import TextDataModule
from lit_align.models.backbone import Backbone


def export_folders(roles: dict[str, Backbone], folder: Path) -> dict[Backbone, Path]:
    """The folder of each network: `folder` of a single one, else one for each.

    Args:
        roles: Networks by role; several roles on one network are saved with it.
        folder: Of all.
    """
    networks = {network: role for role, network in reversed(roles.items())}
    return {
        network: folder if len(networks) == 1 else folder / role
        for network, role in networks.items()
    }


def write_stop_ids(network: Backbone, data: TextDataModule) -> PreTrainedTokenizerBase:
    """Writes into the model's own configuration where texts end; the tokenizer to go with it.

    transformers' classifiers read the score at the last token that is not padding: there a stop
    that is padding as well would be skipped.

    Args:
        network: About to be saved.
        data: Has the tokenizer.
    """
    model, tokenizer = network.network, data.tokenizer
    stops = sorted({*network.stop_ids, *data.stop_ids})
    if model.can_generate():
        model.generation_config.eos_token_id = stops
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    elif tokenizer.pad_token_id in stops:
        tokenizer = copy_with_other_pad_token(tokenizer, stops)
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def copy_with_other_pad_token(
    tokenizer: PreTrainedTokenizerBase, stops: list[int]
) -> PreTrainedTokenizerBase:
    """A copy that pads with a special token which is no stop, if it has one.

    Args:
        tokenizer: Pads with a stop.
        stops: Token ids that end texts.
    """
    apart = deepcopy(tokenizer)
    spare = [token for token in (apart.unk_token, apart.bos_token) if token is not None]
    for token in spare:
        if apart.convert_tokens_to_ids(token) not in stops:
            apart.pad_token = token
            return apart
    rank_zero_warn(
        "the tokenizer pads with the stop and has no other special token: transformers will read "
        "the exported model's scores one token early unless texts are scored one by one"
    )
    return apart


def remove_stale_files(folder: Path, network: Backbone, is_full_model: bool = False) -> None:
    """Removes what an earlier run left there and transformers would load along with the new.

    An adapter's folder names its base, unless it holds a whole model's configuration; a whole
    model's folder gets the adapter that lies beside it.

    Args:
        folder: The folder to be written.
        network: What will be saved there.
        is_full_model: Whether all of its weights will be, with its adapter in them.
    """
    if is_full_model or network.saves_full_model:
        for file in folder.glob("adapter_*"):
            file.unlink()
    elif Path(network.name).resolve() != folder.resolve():
        (folder / "config.json").unlink(missing_ok=True)
