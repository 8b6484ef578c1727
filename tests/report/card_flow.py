"""A flow whose card shows the events of a metrics file: what a browser is pointed at."""

import json

from metaflow import FlowSpec, Parameter, card, current, step


class CardFlow(FlowSpec):
    metrics = Parameter("metrics", required=True)
    plan_json = Parameter("plan-json", required=True)
    xz = Parameter("xz", type=float, default=2.05)

    @card(type="blank")
    @step
    def start(self):
        from metaflow_extensions.hf.card_components import show
        from metaflow_hf import report
        from metaflow_hf.events import Evaluated, Sampled

        events = report.read_events(self.metrics)
        plan = report.Plan(**json.loads(self.plan_json))
        show(current.card, report.training_page(plan, events[: len(events) // 2]))
        measured = {event.name: event for event in events if isinstance(event, Evaluated)}
        outcome = report.Outcome(
            plan=plan,
            before=measured["before"],
            after=measured["after"],
            unigram=measured["unigram"],
            xz_bits_per_byte=self.xz,
            samples=tuple(event for event in events if isinstance(event, Sampled) and not event.round),
            worst=(
                report.WorstRow(
                    place="block 0, row 17",
                    text="b'\\x00\\x01' 0xdeadbeef <b>",
                    loss=7.31,
                    loss_before=8.9,
                    tokens=41,
                ),
                report.WorstRow(
                    place="block 2, row 4", text="Größe | naïve …", loss=6.12, loss_before=None, tokens=9
                ),
            ),
            model={
                "type": "model",
                "key": "models/TrainFlow/17/merge/5/final-8c1f0a.json",
                "digest": "8c1f0a" * 10 + "beef",
                "size": 5_812_331,
                "num_files": 6,
                "created_on": "2026-01-31T12:00:00Z",
                "pathspec": "TrainFlow/17/merge/5",
            },
            tokens=7_864_320,
            seconds=88.0,
            run_pathspec="TrainFlow/17",
        )
        show(current.card, report.training_page(plan, events, outcome))
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    CardFlow()
