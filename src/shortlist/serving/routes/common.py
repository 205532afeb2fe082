"""What routes share: the parts of a server, how a question gets its answer, and what refusals look like in the API's description."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from fastapi import Response

from shortlist.cascade.answers import Answer
from shortlist.cascade.engine import LAST_RESORT, Engine
from shortlist.cascade.questions import Question
from shortlist.cascade.trials import Trials
from shortlist.serving.batching import Batcher, Late, Overloaded
from shortlist.serving.budgeting import Budgets
from shortlist.serving.logs import CALL
from shortlist.serving.metrics import Metrics
from shortlist.serving.schemas import Problem
from shortlist.serving.settings import ServerConfig
from shortlist.serving.shadow import Shadow
from shortlist.serving.watching import Watcher

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is not JSON."},
    413: {"model": Problem, "description": "The body is too long."},
    415: {"model": Problem, "description": "The body is not declared as JSON."},
    422: {"model": Problem, "description": "Something in the request is not what it should be."},
}
OVERLOADED: dict[int | str, dict[str, Any]] = {
    503: {"model": Problem, "description": "More requests wait than can be answered in time."}
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """What a route may use."""

    engine: Engine
    batcher: Batcher
    metrics: Metrics
    config: ServerConfig
    budgets: Budgets
    """Sets what requests may cost."""
    watcher: Watcher | None = None
    """Follows a place of published runs; None = a single run is served."""
    shadow: Shadow | None = None
    """Another run that answers a share of the traffic unseen."""
    trials: Trials | None = None
    """Experiments at work; None = none are."""

    async def ask(self, question: Question) -> Answer:
        """The answer to a question, put together with others that wait; Overloaded where too many do.

        One that a hanging worker holds beyond the time limit gets the most popular items that it permits.
        """
        began = time.perf_counter()
        try:
            made = await self.batcher.ask(question)
        except Late as error:
            made = self.engine.last_resort(question, str(error))
            if self.trials is not None:
                made = self.trials.missed(question, made)
        except Overloaded:
            self.engine.answered((time.perf_counter() - began) * 1e3, failed=True)
            raise
        self.engine.answered((time.perf_counter() - began) * 1e3, failed=made.chain == LAST_RESORT)
        self.metrics.page(made)
        if self.shadow is not None:
            self.shadow.offer(question, made)
        call = CALL.get()
        if call is not None:
            call.page = made.request_id
        return made


def plain_json(content: Any) -> Response:
    """Plain values as they are: the engine made them, so nothing has to be checked again on the way out."""
    return Response(json.dumps(content, ensure_ascii=False, allow_nan=False), media_type="application/json")
