import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.io.ByteArrayInputStream;

/** Posts to a server as Java programs do that set nothing: LangChain4j's, Spring AI's. A line for each answer. */
public class JavaClient {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        String large = "{\"input\":\"" + "some words ".repeat(20_000) + "\"}";
        for (String body : new String[] {"{\"input\":\"x\"}", "{\"input\":[\"x\",\"é\"]}", large}) {
            tell(client, BodyPublishers.ofString(body), arguments[0]);
            byte[] bytes = body.getBytes(StandardCharsets.UTF_8);
            tell(client, BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(bytes)), arguments[0]); // in chunks
        }
        HttpRequest get = HttpRequest.newBuilder(URI.create(arguments[0] + "/v1/models")).build();
        System.out.println(client.send(get, BodyHandlers.ofString()).statusCode());
    }

    private static void tell(HttpClient client, HttpRequest.BodyPublisher body, String url) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(url + "/v1/embeddings"))
            .header("Content-Type", "application/json").POST(body).build();
        var answer = client.send(request, BodyHandlers.ofString());
        System.out.println(answer.statusCode() + " " + answer.version() + " " + answer.body().contains("\"embedding\":["));
    }
}
