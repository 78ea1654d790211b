"""Record what stock LeRobot computes: writes and checks the folders under tests/golden.

    python tools/make_golden.py --list                        what can be recorded; needs no LeRobot
    $LEROBOT_PYTHON tools/make_golden.py act                  record every variant of a policy
    $LEROBOT_PYTHON tools/make_golden.py act --variant vae_2cam --seed 1 --out /tmp/golden
    $LEROBOT_PYTHON tools/make_golden.py --check              compute the recorded folders again and compare

LEROBOT_PYTHON is the Python of an environment with lerobot==0.6.1. Its policies run unmodified, on one CPU thread,
with every parameter and every input drawn from names and the seed. A folder POLICY/VARIANT_sSEED is written only if
the policy, loaded from it anew and given the recorded noise, computes the same numbers again. It holds

    model/                 what LeRobot's save_pretrained writes; of most variants without model.safetensors
    batch.safetensors      raw/ a training batch; in/ the same preprocessed, of images the first sample only;
                           obs/T/ the observation of step T; obs_in/T/ the same preprocessed, without images;
                           noise/CASE/NNN each random tensor that a case draws, in order. KEY#u8 / 255 is an image
    expected.safetensors   CASE/... what LeRobot computed, dropout off:
        loss, loss_train   in evaluation and in training mode: loss, info/..., grad_norm, grad_sum and grad_head
                           (first 8 entries) of each parameter, buffers_after/... where the pass changes any
        loss_none          one loss a sample, where LeRobot has it
        train_steps        3 updates: loss, grad_norm, lr; state_norm and state_head after them
        chunk, select      a chunk of actions; 8 calls of select_action; post/ is after the postprocessor
    meta.json              names of parameters in the order of the summaries, what was drawn where, versions, and
                           noise_floor: output -> [how far it moves when every weight moves by one ulp, its scale]

Recording another configuration takes a Variant in tools/goldens/POLICY.py; another policy takes one such file.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
from goldens import Variant, find_policies

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # stock LeRobot's environment does not have this project

from lerobot_jax.errors import InputError, reported_on_one_line  # noqa: E402
from tests.goldens import Golden  # noqa: E402

SHARED_BYTES = 1024  # equal arrays of this size and more are stored once


def make(policy: str, name: str, variant: Variant, seed: int, root: Path) -> None:
    """Record a variant; its folder appears only when LeRobot computes the same numbers again.

    Raises:
        InputError: listing the numbers that differ.
    """
    from goldens.stock.recording import differences, record

    folder = root / policy / f"{name}_s{seed}"
    with tempfile.TemporaryDirectory() as temporary:
        draft = Path(temporary) / folder.name
        new = record(policy, name, variant, seed, draft)
        left_out = store(new.batch, draft / "batch.safetensors")
        left_out |= store(new.expected, draft / "expected.safetensors")
        meta = new.meta | {"dedup": left_out}
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in meta.items())
        (draft / "meta.json").write_text(f"{{\n{lines}\n}}\n")
        found = differences(Golden(draft))
        if found:
            raise InputError(
                f"{folder}: not written, LeRobot computes other numbers again: {'; '.join(found)}"
            )
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(draft, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {len(new.expected)} outputs, {size / 1000:.0f} kB", flush=True)


def store(arrays: dict[str, np.ndarray], path: Path) -> dict[str, str]:
    """Write arrays, equal ones once; give left out name -> stored name. Images (uint8) get the suffix #u8."""
    first: dict[tuple, str] = {}
    stored, left_out = {}, {}
    for name, array in arrays.items():
        content = (array.dtype.str, array.shape, array.tobytes())
        if array.nbytes >= SHARED_BYTES and content in first:
            left_out[name] = first[content]
        else:
            first[content] = name
            stored[f"{name}#u8" if array.dtype == np.uint8 else name] = np.array(array, order="C")
    safetensors.numpy.save_file(stored, path)
    return left_out


def check(folders: list[Path]) -> None:
    """Compute recorded folders again and compare.

    Raises:
        InputError: listing every folder and output that differs.
    """
    from goldens.stock.recording import differences

    problems = []
    for folder in folders:
        found = differences(Golden(folder))
        problems += [f"{folder}: {difference}" for difference in found]
        print(f"{folder}: {'differs' if found else 'the same'}", flush=True)
    if problems:
        raise InputError("stock LeRobot computes other numbers:\n  " + "\n  ".join(problems))


def select_variants(policy: str | None, variant: str | None) -> dict[tuple[str, str], Variant]:
    """Give (policy, variant) -> Variant for what the user names; everything when nothing is named.

    Raises:
        InputError: naming what there is, when there is no such policy or variant.
    """
    policies = find_policies()
    if policy is not None and policy not in policies:
        raise InputError(f"no policy '{policy}' in tools/goldens; there are {', '.join(policies)}")
    chosen = {policy: policies[policy]} if policy else policies
    table = {(p, v): found for p, module in chosen.items() for v, found in module.VARIANTS.items()}
    if variant is None:
        return table
    named = {key: found for key, found in table.items() if key[1] == variant}
    if not named:
        raise InputError(f"no variant '{variant}'; there are {', '.join(v for _, v in table)}")
    return named


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", nargs="?", help="the policy's type, as in config.json")
    parser.add_argument("--variant", help="one of --list; all of them unless given")
    parser.add_argument(
        "--seed", type=int, help="of weights, inputs and noise (0); with --check: only this one"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden", help="folder of the folders")
    parser.add_argument("--list", action="store_true", help="list what can be recorded")
    parser.add_argument("--check", action="store_true", help="compute recorded folders again and compare")
    args = parser.parse_args()
    variants = select_variants(args.policy, args.variant)
    if args.list:
        for (policy, name), variant in variants.items():
            print(f"{policy} --variant {name:16} {variant.about}")
    elif args.check:
        seeds = "*" if args.seed is None else args.seed
        folders = [path for p, v in variants for path in sorted((args.out / p).glob(f"{v}_s{seeds}"))]
        if not folders:
            raise InputError(f"{args.out}: none of the recorded folders that were asked for is here")
        check(folders)
    elif args.policy is None:
        parser.error("name the policy to record, or give --list or --check")
    else:
        for (policy, name), variant in variants.items():
            make(policy, name, variant, args.seed or 0, args.out)


if __name__ == "__main__":
    with reported_on_one_line():
        main()
