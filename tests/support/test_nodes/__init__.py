"""Helper nodes for server tests, loaded by ComfyUI in addition to the pack. Their ids begin with QetTest_."""

from __future__ import annotations

from .narrow import Condition, Latent, NarrowModel
from .state import Digest, DrawGlobally, GlobalState, SeedGlobally
from .values import Environment, PassOn, SaveText, Wait

NODE_CLASS_MAPPINGS = {
    "QetTest_SaveText": SaveText,
    "QetTest_GlobalState": GlobalState,
    "QetTest_SeedGlobally": SeedGlobally,
    "QetTest_DrawGlobally": DrawGlobally,
    "QetTest_Digest": Digest,
    "QetTest_PassOn": PassOn,
    "QetTest_Wait": Wait,
    "QetTest_Environment": Environment,
    "QetTest_NarrowModel": NarrowModel,
    "QetTest_Condition": Condition,
    "QetTest_Latent": Latent,
}
