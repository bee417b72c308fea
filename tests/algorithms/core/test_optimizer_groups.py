"""Optimizer groups: settings that an optimizer refuses are named by their flag."""

import pytest
from tiny_models import tiny
from torch.optim import AdamW

from lit_align.algorithms.sft import SFT
from lit_align.errors import UserError
from lit_align.optim.galore import GaLore


def configured(optimizer) -> SFT:
    """Return SFT with a built policy and this optimizer."""
    algorithm = SFT(policy=tiny, optimizer=optimizer)
    algorithm.configure_model()
    return algorithm


def test_a_value_that_torch_refuses_names_the_flag():
    algorithm = configured(lambda params: AdamW(params, lr=-1.0))
    with pytest.raises(
        UserError, match=r"^--model.optimizer: Invalid learning rate: -1.0"
    ) as error:
        algorithm.configure_optimizers()
    assert type(error.value.__cause__) is ValueError


@pytest.mark.parametrize(
    "settings",
    [{"rank": 10_000}, {"rank": 0}, {"per_layer": True}],
    ids=["a rank that saves nothing", "a rank of 0", "clipping of gradients that are freed"],
)
def test_settings_that_galore_refuses_name_the_flag(settings):
    algorithm = configured(lambda params: GaLore(params, lr=1e-3, **settings))
    with pytest.raises(UserError, match=r"^--model.optimizer: .*(GaLore|per_layer)"):
        algorithm.configure_optimizers()


def test_other_errors_of_an_optimizer_keep_their_type():
    algorithm = configured(lambda params: AdamW(params, lr="fast"))
    with pytest.raises(TypeError):
        algorithm.configure_optimizers()


def test_the_optimizer_has_a_group_per_role_with_the_names_of_its_weights():
    algorithm = configured(lambda params: AdamW(params, lr=0.5))
    (group,) = algorithm.configure_optimizers().param_groups
    assert (group["role"], group["lr"], group["max_grad_norm"]) == ("policy", 0.5, 1.0)
    assert len(group["param_names"]) == len(group["params"])
    assert "lm_head.weight" in group["param_names"][-1]
