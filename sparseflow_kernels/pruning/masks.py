"""Where the masks lay in version 0.1.0: pickles of pruned modules name them here."""

from ..masks import (  # noqa: F401
    _Refresh,
    check_maskable,
    copy_module,
    count,
    effective,
    effective_parameters,
    live_mask,
    refresh_,
    remove_masks_,
    set_mask_,
)
