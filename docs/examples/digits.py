"""Write the prompts of the digit completion task for real_digits.yaml.

    python docs/examples/digits.py      # writes runs/digits/train.jsonl and runs/digits/test.jsonl

The prompt `8,3:9,4` asks for the 4 numbers that follow 8 and 3 in equal steps modulo 9, as in the
task of verl's tests. All first numbers 0 to 9, steps 0 to 8 and counts 1 to 9 give 810 prompts, of
which 90 are held out.
"""

import json
import random
from pathlib import Path

FOLDER = Path("runs/digits")
MODULUS, NUM_TEST = 9, 90


def make_prompts(seed: int = 0) -> list[str]:
    """Return all prompts in random order.

    >>> len(make_prompts()), "8,3:9,4" in make_prompts()
    (810, True)
    """
    prompts = [
        f"{first},{(first + step) % MODULUS}:{MODULUS},{count}"
        for first in range(10)
        for step in range(MODULUS)
        for count in range(1, 10)
    ]
    random.Random(seed).shuffle(prompts)
    return prompts


def write(prompts: list[str], file: Path) -> None:
    """Write one conversation of one turn per line."""
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print(f"wrote {len(rows)} prompts to {file}")


if __name__ == "__main__":
    prompts = make_prompts()
    write(prompts[NUM_TEST:], FOLDER / "train.jsonl")
    write(prompts[:NUM_TEST], FOLDER / "test.jsonl")
