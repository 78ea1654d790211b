"""What a policy is told in training.

A text that is the task alone is tokenized once, with all others of the datasets, and a sample has the number of
its task. A text that tells numbers of the sample, as pi0.5's tells the state, is tokenized when the sample is read:
on the host, by the threads of the loader, with the statistics of the sample's dataset.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped

from lerobot_jax.data.samples import Batch
from lerobot_jax.features import TASK, TASK_INDEX
from lerobot_jax.policies.base import FunctionalPolicy
from lerobot_jax.processors import RenameObservations

if TYPE_CHECKING:
    from lerobot_jax.training_data import Source


def text_keys(policy: FunctionalPolicy) -> list[str]:
    """List what a dataset must give of a sample's text: nothing, the task, or only its number."""
    if not policy.preprocessor.has_text:
        return []
    return [TASK] if policy.preprocessor.text_tells_numbers else [TASK_INDEX]


def with_task_tokens(
    policies: Sequence[FunctionalPolicy], sources: Sequence["Source"]
) -> list[FunctionalPolicy]:
    """Give each policy the tokens of its dataset's tasks, if its samples have nothing but a task's number."""
    if text_keys(policies[0]) != [TASK_INDEX]:
        return list(policies)
    tables = _task_tokens(policies[0], sources)
    return [each.replace(task_tokens=table) for each, table in zip(policies, tables, strict=True)]


def _task_tokens(
    policy: FunctionalPolicy, sources: Sequence["Source"]
) -> list[dict[str, Shaped[np.ndarray, "tasks l"]]]:
    """Tokenize the tasks of all datasets, once and together, so that all have the same number of tokens."""
    tasks = [task for source in sources for task in source.meta.tasks]
    is_plan = all(source.data is None for source in sources)
    tokens = (is_plan and policy.preprocessor.blank_tokens(len(tasks))) or policy.tokenize({TASK: tasks})
    ends = np.cumsum([len(source.meta.tasks) for source in sources])[:-1]
    parts = {key: np.split(table, ends) for key, table in tokens.items()}
    return [{key: tables[i] for key, tables in parts.items()} for i in range(len(sources))]


def make_tokenize(
    policy: FunctionalPolicy, *, is_mixture: bool, is_plan: bool = False
) -> Callable[[Batch], Batch] | None:
    """Give the function that tokenizes texts that tell numbers; None where there are none. The numbers stay raw.

    Args:
        policy: has the statistics of the samples' dataset.
        is_mixture: whether they have the policy's names and widths already.
        is_plan: whether only the shapes matter.
    """
    if not policy.preprocessor.text_tells_numbers:
        return None
    if is_mixture:
        policy = with_own_names(policy)

    def tokenize(batch: Batch) -> Batch:
        if is_plan and (blank := policy.preprocessor.blank_tokens(1)):
            return {key: value for key, value in {**batch, **blank}.items() if key != TASK}
        told = policy.tokenize(batch if is_mixture else with_single_axes(policy, batch))
        return {key: batch.get(key, value) for key, value in told.items()}

    return tokenize


def with_own_names(policy: FunctionalPolicy) -> FunctionalPolicy:
    """Give a policy for batches that have its names already, as those of a mixture."""
    return policy.replace(preprocessor=policy.preprocessor.replace(RenameObservations({})))


def with_single_axes(policy: FunctionalPolicy, batch: Batch) -> Batch:
    """Restore the axis of single numbers, which LeRobot's datasets drop."""
    features = {**policy.config.input_features, **policy.config.output_features}
    names = {key: policy.preprocessor.rename_map.get(key, key) for key in batch}
    single = [key for key, name in names.items() if name in features and features[name].shape == (1,)]
    return batch | {key: batch[key][..., None] for key in single}
