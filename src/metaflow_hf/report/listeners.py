"""Several listeners as one."""

from metaflow_hf.events import Event, OnEvent


def fan_out(*listeners: OnEvent) -> OnEvent:
    """A listener that hands each event to all of these, in this order; the first error stops and is raised."""

    def on_event(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return on_event
