// The OpenAI SDK for JavaScript: node openai_node.mjs URL PICTURE; what came is printed as JSON.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, picture] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const question = "这是什么？";
const content = [{ type: "image_url", image_url: { url: picture } }, { type: "text", text: question }];
const asked = { model: "seechat-lite-builtin", messages: [{ role: "user", content }] };
const shown = [{ type: "input_image", image_url: picture, detail: "auto" }, { type: "input_text", text: question }];
const input = { model: "seechat-lite-builtin", input: [{ role: "user", content: shown }] };
const Animal = z.object({ animal: z.enum(["panda", "frog"]), legs: z.union([z.literal(2), z.literal(4)]) });

const told = {};
told.chat = (await client.chat.completions.create(asked)).choices[0].message.content;
told.chat_stream = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
  told.chat_stream += chunk.choices[0].delta.content ?? "";
told.responses = (await client.responses.create(input)).output_text;
told.responses_stream = (await client.responses.stream(input).finalResponse()).output_text;
const format = zodResponseFormat(Animal, "animal");
told.chat_json = (await client.chat.completions.parse({ ...asked, response_format: format })).choices[0].message.parsed;
const text = { format: zodTextFormat(Animal, "animal") };
told.responses_json = (await client.responses.parse({ ...input, text })).output_parsed;
told.completions = (await client.completions.create({ model: asked.model, prompt: "你好" })).choices[0].text;
told.models = (await client.models.list()).data.map((model) => model.id);
try {
  await client.chat.completions.create({ ...asked, model: "other" });
} catch (error) {
  told.error = [error.status, error.code, Boolean(error.requestID)];
}
console.log(JSON.stringify(told));
