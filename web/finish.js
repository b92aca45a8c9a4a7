// The button "Finish now": ends the training of its node after the step under way and keeps the picture.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const TRAINERS = ["SpliceAppearanceTransfer", "SpliceOptimizer", "SpliceInvertFeatures", "SpliceAblation"];
const LABEL = "Finish now";
const AGAIN = "Finishing; press again to end the batch";
const IDLE = "Not running";
const ENDINGS = ["executing", "execution_success", "execution_error", "execution_interrupted"];
const IDLE_MILLISECONDS = 1500;

// What the server calls a node: within subgraphs, the ids of all nodes on the way to it, once for each way.
const executionIds = (node, graph = app.rootGraph ?? app.graph, way = "") =>
  graph.nodes.flatMap((other) => {
    if (other === node) return [`${way}${node.id}`];
    return other.subgraph ? executionIds(node, other.subgraph, `${way}${other.id}:`) : [];
  });

app.registerExtension({
  name: "Splice.FinishNow",
  nodeCreated(node) {
    if (!TRAINERS.includes(node.comfyClass)) return;
    const show = (label) => {
      button.label = label;
      node.setDirtyCanvas?.(true);
    };
    const finish = async () => {
      const body = JSON.stringify({ nodes: executionIds(node), client: api.clientId });
      const headers = { "Content-Type": "application/json" };
      const answer = await api.fetchApi("/splice/finish", { method: "POST", body, headers });
      const running = answer.ok && (await answer.json()).running;
      show(running ? AGAIN : IDLE);
      if (!running) setTimeout(() => button.label === IDLE && show(LABEL), IDLE_MILLISECONDS);
    };
    const button = node.addWidget("button", LABEL, null, finish);
    button.label = LABEL;
    button.serialize = false;
    button.options.serialize = false;
    button.tooltip = "Ends this training after the step under way and keeps the picture so far; again: ends the batch.";
    const ended = () => button.label === AGAIN && show(LABEL);
    ENDINGS.forEach((event) => api.addEventListener(event, ended));
    const removed = node.onRemoved;
    node.onRemoved = function (...given) {
      ENDINGS.forEach((event) => api.removeEventListener(event, ended));
      return removed?.apply(this, given);
    };
  },
});
