"""Folders of exported weights: their paths, stop ids and stale files."""

from copy import deepcopy
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lit_align.data.base import TextDataModule
from lit_align.models.backbone import Backbone


def export_folders(roles: dict[str, Backbone], folder: Path) -> dict[Backbone, Path]:
    """Return the folder of each network: `folder` itself, or `folder/<role>` for several.

    Args:
        roles: Networks by role. Several roles of one network share its folder.
        folder: Folder of the export.
    """
    networks = {network: role for role, network in reversed(roles.items())}
    return {
        network: folder if len(networks) == 1 else folder / role
        for network, role in networks.items()
    }


def write_stop_ids(network: Backbone, data: TextDataModule) -> PreTrainedTokenizerBase:
    """Write the stop ids and the pad id to the model's configuration; return the tokenizer.

    A classifier of transformers reads the score at the last token that is not padding. A stop
    token that is also the pad token would be skipped, so its tokenizer gets another pad token.

    Args:
        network: Network that is saved next.
        data: Data module with the tokenizer.
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
    """Return a copy whose pad token is not a stop, if the tokenizer has such a special token.

    Args:
        tokenizer: Tokenizer whose pad token is a stop.
        stops: Token ids that end texts.

    Example:
        >>> from lit_align.data.toy import toy_tokenizer
        >>> copy_with_other_pad_token(toy_tokenizer(), stops=[0]).pad_token
        '<unk>'
    """
    copied = deepcopy(tokenizer)
    candidates = [token for token in (copied.unk_token, copied.bos_token) if token is not None]
    for token in candidates:
        if copied.convert_tokens_to_ids(token) not in stops:
            copied.pad_token = token
            return copied
    rank_zero_warn(
        "the pad token is a stop token and the tokenizer has no other special token. transformers "
        "will read the exported model's scores one token early. Score texts one by one."
    )
    return copied


def remove_stale_files(folder: Path, network: Backbone, is_full_model: bool = False) -> None:
    """Remove files of an earlier export that transformers would load with the new ones.

    transformers would add an old adapter to a full model, and would read an old config.json in the
    place of an adapter's base.

    Args:
        folder: Folder of the new export.
        network: Network that is saved there.
        is_full_model: True if its adapter is merged into the weights.
    """
    if is_full_model or network.saves_full_model:
        for file in folder.glob("adapter_*"):
            file.unlink()
    elif Path(network.name).resolve() != folder.resolve():
        (folder / "config.json").unlink(missing_ok=True)
