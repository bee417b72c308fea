"""Copy a few cases of the full golden files into this folder.

    python tests/golden/pick_cases.py FOLDER_OF_FULL_FILES

Numbers have the fewest digits that give the same float32, which is what tests read.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
PAIR = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"]
GAE = ["gamma=1.0,lam=0.95", "gamma=0.9,lam=0.0"]
RTO = ["token_reward", "reward", "advantages(gamma=1,lam=0.95)", "returns"]
SURROGATE = ["loss", "grad_logp"]
STEPS = 5  # of GaLore's 8 gradients: both subspaces are in use by then

# file: (inputs, {case: its entries, or None if a case is one list})
PICKS: dict[str, tuple[list[str], dict[str, list[str] | None]]] = {
    "dpo_reference": (
        ["logits", "labels", *PAIR],
        {
            "get_batch_logps,average=False": ["logps", "grad_logits_of_sum"],
            **{
                f"beta=0.1,label_smoothing={case},reference_free=False": [
                    "losses",
                    "mean",
                    "grad_policy_chosen_of_mean",
                ]
                for case in ("0.0,ipo=False", "0.1,ipo=False", "0.0,ipo=True")
            },
        },
    ),
    "galore_projector": (
        ["grads_12x6", "grads_6x12", "grads_8x8"],
        {
            case: ["low_rank", "projected_back", "basis_at_steps_0_and_4"]
            for case in ("12x6,std", "6x12,std", "8x8,full")
        },
    ),
    "openrlhf_advantages": (
        ["scores", "old_logp", "ref_logp", "mask", "values"],
        {
            **{
                f"{name},gamma=1,lam=0.95,kl_coef=0.05": ["advantages"]
                for name in ("group_norm", "dr_grpo", "rloo")
            },
            **{
                f"{name},gamma=1,lam=0.95,kl_coef=0.05": ["advantages", "returns"]
                for name in ("gae", "reinforce_baseline")
            },
        },
    ),
    "openrlhf_dpo_loss": (
        PAIR,
        {
            f"beta=0.1,label_smoothing={case}": ["loss", "grad_policy_chosen"]
            for case in ("0.0,ipo=False", "0.1,ipo=False", "0.0,ipo=True")
        },
    ),
    "openrlhf_gae": (
        ["token_rewards", "values", "mask"],
        {
            **{f"gae,{case}": ["advantages", "returns"] for case in GAE},
            "cumulative_returns,gamma=0.9": None,
        },
    ),
    "openrlhf_misc": (
        ["logp", "ref_logp", "logits", "ids", "adv", "mask", "old_logp", "scores"],
        dict.fromkeys(
            [
                "k1",
                "k2",
                "k3",
                "log_probs_from_logits,temperature=0.7",
                "masked_mean,dim=-1",
                "compute_reward,kl_coef=0.05,kl=k1*mask",
                "compute_reward,kl_coef=0.05,clip=(-0.5,0.5)",
                "adaptive_kl(init=0.2,target=6,horizon=10000)[kl,n_steps,value_after]",
            ]
        ),
    ),
    "openrlhf_policy_loss": (
        ["logp", "old_logp", "adv", "mask", "logp_wild", "adv_seq"],
        {
            "ppo,low=0.2,high=0.28,dual_clip=None,token_level=True": SURROGATE,
            "ppo,low=0.2,high=0.28,dual_clip=None,token_level=False": SURROGATE,
            "ppo,logp_wild,low=0.2,high=0.28,dual_clip=None,token_level=True": SURROGATE,
            "gspo,low=0.2,high=0.28,adv=adv_seq": SURROGATE,
        },
    ),
    "openrlhf_reward_model_loss": (
        ["chosen_reward", "rejected_reward", "margin"],
        {
            case: ["loss", "grad_chosen_reward"]
            for case in (
                "PairWiseLoss,margin=None",
                "PairWiseLoss,margin=given",
                "LogExpLoss,margin=None",
            )
        },
    ),
    "openrlhf_sft_loss": (["logits", "labels"], {"GPTLMLoss": ["loss", "grad_logits"]}),
    "openrlhf_value_loss": (
        ["new_values", "values", "returns", "mask"],
        {
            f"clip={case}": ["loss", "grad_new_values"]
            for case in ("None,token_level=True", "0.2,token_level=True", "0.2,token_level=False")
        },
    ),
    "rto_rewards": (
        ["dpo_logp", "ref_logp", "mask", "old_logp", "scores", "values", "big_scores"],
        {
            "scale=0.05,clip=0.05,kl_coef=0.01": RTO,
            "scale=1.0,clip=0.0,kl_coef=0.0": RTO,
            "no token reward,big_scores,kl_coef=0.01": ["reward"],
        },
    ),
    "torchtune_dpo_loss": (
        PAIR,
        {
            f"beta=0.1,label_smoothing={smoothing}": [
                "losses",
                "mean",
                "grad_policy_chosen_of_mean",
            ]
            for smoothing in ("0.0", "0.1")
        },
    ),
    "torchtune_gae": (
        ["adv", "mask", "token_rewards", "values"],
        {
            "whiten(adv,mask,shift_mean=False)": None,
            **{case: ["raw_advantages", "returns"] for case in GAE},
        },
    ),
    "torchtune_grpo_loss": (
        ["logp", "old_logp", "adv_seq", "ref_logp", "mask"],
        {
            "GRPOLoss,epsilon=0.2,kl=0.1": ["kl", "loss", "grad_logp"],
            "GRPOSimpleLoss,epsilon=0.2,kl=0.1": ["loss", "grad_logp"],
        },
    ),
    "torchtune_ppo_loss": (
        ["logp", "new_values", "old_logp", "adv", "mask", "values", "returns"],
        {
            case: ["policy_loss", "grad_logp", "value_loss"]
            for case in (
                "epsilon=0.2,value_clip=0.2,value_coeff=0.1",
                "epsilon=0.1,value_clip=0.5,value_coeff=1.0",
            )
        },
    ),
    "torchtune_rewards": (
        ["old_logp", "ref_logp", "scores", "mask"],
        {
            "kl_coeff=0.05": ["kl", "total_reward"],
            "truncate_at_first_stop([[5,2,7,2],[5,6,7,8],[2,1,1,1]],stop=2,fill=0)": [
                "padding_mask"
            ],
        },
    ),
}


def shorten(value: Any) -> Any:
    """Return nested lists with each float in the fewest digits of its float32."""
    if isinstance(value, list):
        return [shorten(part) for part in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def pick(name: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs and cases of one file that `PICKS` names."""
    inputs, cases = PICKS[name]
    last = STEPS if name == "galore_projector" else None
    picked: dict[str, Any] = {}
    for case, entries in cases.items():
        found = content["cases"][case]
        if entries is None:
            picked[case] = shorten(found)
        else:
            picked[case] = {
                entry: shorten(found[entry][:last]) if last else shorten(found[entry])
                for entry in entries
            }
    return {
        "inputs": {key: shorten(content["inputs"][key][:last]) for key in inputs},
        "cases": picked,
    }


def main(folder: str) -> None:
    """Write all picked files."""
    for name in PICKS:
        content = json.loads((Path(folder) / f"{name}.json").read_text())
        text = json.dumps(pick(name, content), separators=(",", ":"))
        (HERE / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
