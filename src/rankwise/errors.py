"""The errors rankwise raises, each with one line: what was wrong, what was found, what to do."""


class RankwiseError(ValueError):
    """Wrong input; the message says what was found and what to do."""


class DataError(RankwiseError):
    """The rows, columns or labels cannot be used as they are."""


class PlanError(RankwiseError):
    """A rank plan is malformed, or does not fit the model it is used with."""


class ModelError(RankwiseError):
    """A model or tokenizer cannot be loaded, or is not of a kind that can be adapted."""


class AdapterError(RankwiseError):
    """An adapter on disk is damaged, of a kind that cannot be truncated, or lacks the rank."""


class ExportError(RankwiseError):
    """An engine cannot take the adapter in any form that is known here, or would misread it."""


class ResultError(RankwiseError):
    """A result file is damaged, or of another schema."""


class CheckpointError(RankwiseError):
    """A checkpoint is missing, incomplete, or belongs to another run."""


class OutputError(RankwiseError):
    """The output folder cannot be written, or holds something that would be overwritten."""


class DivergedError(RuntimeError):
    """The numbers of a run stopped being finite; the message says where and what to lower."""
