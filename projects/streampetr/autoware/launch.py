"""The launch file of a package: all cameras of the model, and the package's own parameter files."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from mdp_mmdet3d.runtime.manifest import DeploymentManifest

from .generations import NodeGeneration
from .parameters import NodeSettings

LAUNCH_FILE = "streampetr.launch.xml"

_TEMPLATE = """<launch>
  <arg name="model_path" default="$(dirname)" description="folder of this package"/>
  <arg name="build_only" default="false" description="build the TensorRT engines and stop"/>
  <arg name="debug_mode" default={debug_mode} description="publish latencies"/>
  <arg name="is_compressed_image" default={compressed} description="subscribe to compressed images"/>
  <!-- Camera i is slot i of the model's input. -->
{arguments}

  <node pkg="autoware_camera_streampetr" exec="autoware_camera_streampetr_node" name="stream_petr" output="screen">
{files}
    <param name="build_only" value="$(var build_only)"/>
    <param name="debug_mode" value="$(var debug_mode)"/>
    <param name="is_compressed_image" value="$(var is_compressed_image)"/>
{remaps}
  </node>
</launch>
"""

_ARGUMENTS = """  <!-- {name} -->
  <arg name="camera{slot}_image" default="/sensing/camera/camera{slot}/image_rect_color"/>
  <arg name="camera{slot}_info" default="/sensing/camera/camera{slot}/camera_info"/>"""

# Releases differ in which of the two image topics a remap reaches; with both the result is the same.
_REMAPS = """    <remap from="~/input/camera{slot}/camera_info" to="$(var camera{slot}_info)"/>
    <remap from="~/input/camera{slot}/image" to="$(var camera{slot}_image)"/>
    <remap from="~/input/camera{slot}/image/compressed" to="$(var camera{slot}_image)/compressed"/>"""


def launch_file(manifest: DeploymentManifest, settings: NodeSettings, generation: NodeGeneration) -> str:
    """XML that starts the node with this package."""
    slots = list(enumerate(manifest.camera_names))
    return _TEMPLATE.format(
        debug_mode=quoteattr(str(settings.debug_mode).lower()),
        compressed=quoteattr(str(settings.compressed).lower()),
        # A comment must not hold two hyphens.
        arguments="\n".join(
            _ARGUMENTS.format(name=escape(name).replace("--", "- -"), slot=slot) for slot, name in slots
        ),
        files="\n".join(
            f'    <param from="$(var model_path)/{file}" allow_substs="true"/>' for file in generation.files
        ),
        remaps="\n".join(_REMAPS.format(slot=slot) for slot, _ in slots),
    )
