// Vercel's AI SDK with both of its providers: node ai_sdk.mjs URL PICTURE; prints JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText } from "ai";
import { z } from "zod";

const [url, picture] = process.argv.slice(2);
const name = "seechat-lite-builtin";
const baseURL = `${url}/v1`;
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "seechat", baseURL, supportsStructuredOutputs: true });
const models = {
  responses: openai(name), // the provider's default
  chat: openai.chat(name),
  compatible: compatible(name),
};
const content = [{ type: "image", image: picture }, { type: "text", text: "这是什么？" }];
const messages = [{ role: "user", content }];
const schema = z.object({ animal: z.enum(["panda", "frog"]), legs: z.union([z.literal(2), z.literal(4)]) });

const told = {};
for (const [kind, model] of Object.entries(models)) {
  const asked = { model, messages, maxRetries: 0 };
  const done = await generateText(asked);
  const stream = streamText(asked);
  let streamed = "";
  for await (const piece of stream.textStream) streamed += piece;
  const { object } = await generateObject({ ...asked, schema });
  told[kind] = {
    text: done.text,
    streamed,
    reasons: [done.finishReason, await stream.finishReason],
    tokens: done.usage.outputTokens,
    object,
  };
}
const { text } = await generateText({ model: openai.completion(name), prompt: "你好", maxRetries: 0 });
told.completion = text;
console.log(JSON.stringify(told));
