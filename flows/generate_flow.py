"""Generate text with a model that another flow trained, by nothing but its reference.

python flows/generate_flow.py run                             the latest model of TrainFlow
python flows/generate_flow.py run --from_run TrainFlow/17     the model of one run
python flows/generate_flow.py run --chat True                 the prompt as a message to a model for conversations
python flows/generate_flow.py run --text my_texts.txt         its perplexity on a text of yours, too
"""

from metaflow import Flow, FlowSpec, IncludeFile, Parameter, Run, current, model, namespace, step
from metaflow.exception import MetaflowNotFound

from metaflow_extensions.hf import parameters as types
from metaflow_hf.errors import SelectionError
from metaflow_hf.report import ruled


class GenerateFlow(FlowSpec):
    """Reuses a model reference of another flow."""

    from_run = Parameter(
        "from_run",
        type=types.name,
        default="",
        help="Flow/run whose model is used; default: TrainFlow's latest.",
    )
    prompt = Parameter("prompt", type=types.text, default="Return the ", help="The text to continue.")
    chat = Parameter("chat", default=False, help="Send the prompt as a user's message, by the chat template.")
    num_samples = Parameter("num_samples", default=3, help="How many continuations.")
    max_new_tokens = Parameter("max_new_tokens", default=64, help="Length of each, in tokens.")
    temperature = Parameter("temperature", default=0.8, help="0 takes the most likely token each time.")
    seed = Parameter("seed", default=0, help="The same seed gives the same texts.")
    text = IncludeFile("text", required=False, help="A text file to measure the model's perplexity on.")

    @model
    @step
    def start(self):
        """Find the reference: a small dict, whoever made it and whenever."""
        namespace(None)
        try:
            run = Run(self.from_run) if self.from_run else Flow("TrainFlow").latest_successful_run
            self.model = run.data.model
        except (MetaflowNotFound, AttributeError) as error:
            raise SelectionError(
                f"{self.from_run or 'TrainFlow'} has no trained model: run flows/train_flow.py to its end first."
            ) from error
        print(f"Using the model of {run.pathspec}: {self.model['key']}")
        self.next(self.generate)

    @model(load="model")
    @step
    def generate(self):
        """Load the files, continue the prompt."""
        from metaflow_hf.train import evaluate, generate

        directory = current.model.loaded["model"]
        prompt = [{"role": "user", "content": self.prompt}] if self.chat else self.prompt
        self.texts = generate(
            directory,
            [prompt] * self.num_samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )
        self.evaluation = evaluate(directory, [self.text]) if self.text else None
        self.next(self.end)

    @step
    def end(self):
        """Show the texts."""
        for text in self.texts:
            print(ruled(f"{self.prompt}{': ' if self.chat else ''}{text}\n\n"))
        if self.evaluation is not None:
            print(
                f"perplexity {self.evaluation.perplexity:.2f} on {self.evaluation.tokens:,} tokens of {self.text!r:.40}"
            )


if __name__ == "__main__":
    GenerateFlow()
