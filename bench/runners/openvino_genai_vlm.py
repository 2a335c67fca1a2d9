"""OpenVINO GenAI's VLMPipeline; runs in an environment of its own."""

from serving import Stopwatch, serve  # isort: skip  (first: it notes when this process began)

import openvino
import openvino_genai as genai


class Listener(genai.StreamerBase):
    """Passes token ids on as the pipeline makes them."""

    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def write(self, token):
        """Pass on one id, or several at once."""
        for token_id in token if isinstance(token, list) else [token]:
            self.watch.hear(token_id)
        return genai.StreamingStatus.RUNNING

    def end(self):
        """Do nothing: all tokens were passed on."""


class Pipeline:
    """``precision``: of inference, None leaves it to OpenVINO. ``prefix``: prefix caching.
    ``pruned``: percent of an image's tokens that CDPruner removes before the decoder.
    """

    def __init__(self, model, threads, precision, prefix, pruned=0):
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = prefix
        settings = {"INFERENCE_NUM_THREADS": threads, "scheduler_config": scheduler}
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        self.pipeline = genai.VLMPipeline(model, "CPU", **settings)
        self.pruned = pruned
        default = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
        self.about = {
            "openvino": openvino.__version__,
            "openvino-genai": genai.__version__,
            "inference precision": precision or default.get_type_name(),
        }

    def ask(self, image, question, text, new):
        """Answer; GenAI adds a newline of its own after the image's token, so ours is removed."""
        del question
        config = genai.GenerationConfig()
        config.max_new_tokens = new
        config.do_sample = False
        config.ignore_eos = True
        config.apply_chat_template = False  # the text is in it already
        config.pruning_ratio = self.pruned
        watch = Stopwatch()
        done = self.pipeline.generate(
            text.replace("<image>\n", "<image>"),
            images=[openvino.Tensor(image[None])],
            generation_config=config,
            streamer=Listener(watch),
        )
        return watch.heard(done.perf_metrics.get_num_input_tokens())


if __name__ == "__main__":
    serve(Pipeline)
