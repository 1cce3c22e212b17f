"""Run directories: their layout, locks, atomic writes, manifests and `verify`. Imports no torch.

Called by every room but `adapters`; imports only `errors`, `paths` and `json_text`.
"""

from braidlora.runs._adapter_card import (
    AdapterCard,
    AnswerCard,
    BaseRecord,
    PromptCard,
    PromptText,
    TaskCard,
    parse_adapter_card,
    quoted,
    read_adapter_card,
)
from braidlora.runs._around import federation_around, run_around
from braidlora.runs._commit import commit_directory, finish_directory, in_use, restore_all, restore_replaced
from braidlora.runs._coverage import (
    cover,
    covered,
    damages,
    read_covered,
    read_covered_json,
    refuse_changed,
    uncover,
)
from braidlora.runs._directory import RunDirectory, refuse_links
from braidlora.runs._environment import environment, warn_of_another_machine
from braidlora.runs._failing import failing_lines, listed_rounds
from braidlora.runs._federated import FederatedDirectory
from braidlora.runs._files import (
    atomic_write_json,
    atomic_write_text,
    is_leftover,
    json_text,
    read_json,
    remove_at_once,
    remove_leftovers,
    remove_tree,
    temporary_name,
)
from braidlora.runs._flock import try_lock
from braidlora.runs._lines import parse_jsonl, read_jsonl, read_lines, split_lines
from braidlora.runs._lock import LOCK, hold, holder_of, is_lock, working_for
from braidlora.runs._manifest import MANIFEST, Committed, IncompleteError, entry_of_file
from braidlora.runs._names import (
    ADAPTER_CARD,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_CONFIG,
    IDENTITY,
    LOG,
    METRICS,
    MODEL_CARD,
    PREDICTIONS,
    RECIPE,
)
from braidlora.runs._output import CELLS, COMPARISON, comparison_cells, output_of
from braidlora.runs._privacy import privacy_lines
from braidlora.runs._verify import verify
