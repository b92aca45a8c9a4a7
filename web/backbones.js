// The list of backbones tells of which names the weights are on this machine; the names themselves stay as they are.
import { app } from "../../scripts/app.js";

const WIDGET = "backbone_name";
let here = new Set();

function remember(definition) {
  const names = definition?.input?.required?.[WIDGET]?.[1]?.on_this_machine;
  if (names) here = new Set(names);
}

app.registerExtension({
  name: "Splice.BackbonesHere",
  beforeRegisterNodeDef(_type, definition) {
    if (definition.name.startsWith("Splice")) remember(definition);
  },
  refreshComboInNodes(definitions) {
    Object.values(definitions).forEach(remember);
  },
  nodeCreated(node) {
    const widget = node.comfyClass.startsWith("Splice") && node.widgets?.find((one) => one.name === WIDGET);
    if (widget) widget.options.getOptionLabel = (name) => (here.has(name) ? `${name} · here` : name);
  },
});
