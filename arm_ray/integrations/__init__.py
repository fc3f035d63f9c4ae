"""What plugs arm_ray into other tools. The names below are stable."""

from typing import TYPE_CHECKING

from arm_ray.lazy import lazily

if TYPE_CHECKING:
    from arm_ray.integrations.callback import AttachCallback

__all__ = ["AttachCallback"]

__getattr__, __dir__ = lazily(__name__, {"AttachCallback": "arm_ray.integrations.callback"})
