"""An example: ros2 run ... or python examples/ros2_node.py engines.

A node of ROS 2 that answers `question` (std_msgs/String) about the newest `image`
(sensor_msgs/Image, rgb8 or bgr8) on `answer`. It was never run as a node, because ROS 2 is in no
index of Python packages; tests run the function that turns a message into an image.
"""

import sys

import numpy as np
from visistage import runtime


def picture(message):
    """Return the image of a message as an array of RGB; rows may have padding."""
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    image = rows[:, : 3 * message.width].reshape(message.height, message.width, 3)
    if message.encoding not in ("rgb8", "bgr8"):
        raise ValueError(f"encoding {message.encoding}: expected rgb8 or bgr8")
    return image if message.encoding == "rgb8" else np.ascontiguousarray(image[:, :, ::-1])


def main(bundle):
    """Spin until the node is stopped."""
    import rclpy
    from rclpy.node import Node
    from sensor_msgs.msg import Image
    from std_msgs.msg import String

    class Asker(Node):
        """Answers questions about what the camera sees; one at a time, on the newest frame."""

        def __init__(self, session):
            super().__init__("visistage")
            self.session, self.newest = session, None
            self.answers = self.create_publisher(String, "answer", 10)
            self.create_subscription(Image, "image", self.keep, 1)
            self.create_subscription(String, "question", self.answer, 10)

        def keep(self, message):
            """Keep the newest frame."""
            self.newest = message

        def answer(self, question):
            """Publish the answer, or what is wrong with the question or the frame."""
            if self.newest is None:
                self.get_logger().warning("no image has come yet")
                return
            try:
                text = self.session.infer(picture(self.newest), question.data).text
            except (runtime.VisistageError, ValueError) as error:
                self.get_logger().error(str(error))
                return
            self.answers.publish(String(data=text))

    rclpy.init()
    with runtime.load(bundle) as session:
        rclpy.spin(Asker(session))


if __name__ == "__main__":
    main(sys.argv[1])
