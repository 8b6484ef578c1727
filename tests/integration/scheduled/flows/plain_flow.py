"""Uses nothing of this project, which is installed nevertheless."""

from metaflow import Config, FlowSpec, Parameter, retry, step


class PlainFlow(FlowSpec):
    config = Config("config", default_value='{"words": ["a", "b"]}')
    count = Parameter("count", default=2)
    word = Parameter("word", default="")

    @step
    def start(self):
        self.values = list(range(self.count))
        self.next(self.square, foreach="values")

    @retry(times=1)
    @step
    def square(self):
        self.squared = self.input**2
        self.next(self.join)

    @step
    def join(self, inputs):
        print("order", [branch.squared for branch in inputs])
        print("squares", sorted(branch.squared for branch in inputs), self.config.words)
        self.next(self.end)

    @step
    def end(self):
        print("word", repr(self.word))


if __name__ == "__main__":
    PlainFlow()
