"""OpenVINO GenAI's ContinuousBatchingPipeline under several callers; in its own environment."""

from serving import Crowd, serve_crowds  # isort: skip  (first: it notes when this process began)

import openvino
import openvino_genai as genai


class Batching:
    """``precision``: of inference, None leaves it to OpenVINO; prefix caching is off."""

    def __init__(self, model, threads, precision, callers):
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = callers
        settings = {"INFERENCE_NUM_THREADS": threads}
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        self.pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", settings, {}, {})
        default = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
        self.about = {
            "openvino": openvino.__version__,
            "openvino-genai": genai.__version__,
            "inference precision": precision or default.get_type_name(),
        }
        self.asked = 0

    def crowd(self, questions, callers, new):
        """Answer; each caller asks the next question once his last is answered."""
        config = genai.GenerationConfig()
        config.max_new_tokens = new
        config.do_sample = False
        config.ignore_eos = True
        config.apply_chat_template = False  # the text is in it already
        crowd, waiting, under_way = Crowd(len(questions)), list(enumerate(questions)), {}
        while waiting or under_way:
            while waiting and len(under_way) < callers:
                number, (image, question, text) = waiting.pop(0)
                del question
                crowd.ask(number)
                self.asked += 1
                # GenAI adds a newline of its own after the image's token, so ours is removed.
                prompt = text.replace("<image>\n", "<image>")
                images = [openvino.Tensor(image[None])]
                under_way[number] = self.pipeline.add_request(self.asked, prompt, images, config)
            self.pipeline.step()
            for number, handle in list(under_way.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        crowd.hear(number, output.generated_ids)
                if handle.get_status() != genai.GenerationStatus.RUNNING:
                    del under_way[number]
        return crowd


if __name__ == "__main__":
    serve_crowds(Batching)
