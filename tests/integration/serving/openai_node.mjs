// What a Node application does with OpenAI's own client; prints what came of it as JSON.
import OpenAI from "openai";

const client = new OpenAI();
const ask = { model: "fast", messages: [{ role: "user", content: "my invoice is wrong, größer 東京" }], max_tokens: 24, temperature: 0 };
const said = {};
said.models = (await client.models.list()).data.map((model) => model.id);
said.answer = (await client.chat.completions.create(ask)).choices[0].message.content;
said.stream = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  said.stream += chunk.choices[0]?.delta?.content ?? "";
}
const schema = {
  type: "object",
  properties: { queue: { enum: ["billing", "delivery"] } },
  required: ["queue"],
  additionalProperties: false,
};
const format = { type: "json_schema", json_schema: { name: "ticket", schema, strict: true } };
const bound = await client.chat.completions.create({ ...ask, max_tokens: 60, response_format: format });
said.queue = JSON.parse(bound.choices[0].message.content).queue;
try {
  await client.chat.completions.create({ ...ask, model: "theirs" });
} catch (error) {
  said.refused = { status: error.status, code: error.code };
}
console.log(JSON.stringify(said));
