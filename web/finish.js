// The button "Finish now": ends the training after its current step and keeps the picture.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const TRAINERS = ["SpliceAppearanceTransfer", "SpliceOptimizer", "SpliceInvertFeatures", "SpliceAblation"];

app.registerExtension({
  name: "Splice.FinishNow",
  nodeCreated(node) {
    if (!TRAINERS.includes(node.comfyClass)) return;
    const button = node.addWidget("button", "Finish now", null, () => api.fetchApi("/splice/finish", { method: "POST" }));
    button.serialize = false;
    button.options.serialize = false;
    button.tooltip = "Ends the training after the step under way and keeps the picture so far.";
  },
});
