/* A libnvidia-ml.so.1 that answers from a recording: FAKE_NVML names a file of lines "function value". A function that the
 * recording does not have is NOT_SUPPORTED, as on a GB10. "!N" answers with NVML's return code N. While there is a line "hang", nothing
 * that reads the recording comes back. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9 };

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu_instance, compute_instance; } Process;

/* Read anew each time, so that a test can change it. */
static FILE *recording(void) {
    const char *path = getenv("FAKE_NVML");
    for (;;) {
        FILE *file = path ? fopen(path, "r") : NULL;
        char line[512];
        int hangs = 0;
        while (file && fgets(line, sizeof line, file)) hangs |= !strncmp(line, "hang", 4);
        if (file) rewind(file);
        if (!hangs) return file;
        fclose(file);
        usleep(10000);
    }
}

/* The text behind a function's name; an NVML return code. */
static int text(const char *function, char *found, size_t size) {
    FILE *file = recording();
    char line[512];
    int code = NOT_SUPPORTED;
    size_t length = strlen(function);
    while (file && fgets(line, sizeof line, file)) {
        if (strncmp(line, function, length) || line[length] != ' ') continue;
        line[strcspn(line, "\n")] = 0;
        if (line[length + 1] == '!') { code = atoi(line + length + 2); break; }
        snprintf(found, size, "%s", line + length + 1);
        code = OK;
        break;
    }
    if (file) fclose(file);
    return code;
}

static int number(const char *function, unsigned int *found) {
    char said[512];
    int code = text(function, said, sizeof said);
    if (code == OK) *found = (unsigned int)strtoul(said, NULL, 0);
    return code;
}

int nvmlInitWithFlags(unsigned int flags) {
    char said[512];
    int code = getenv("FAKE_NVML") ? text("init", said, sizeof said) : DRIVER_NOT_LOADED;
    (void)flags;
    return code == NOT_SUPPORTED ? OK : code;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { (void)code; return "a recorded error"; }

int nvmlDeviceGetCount_v2(unsigned int *count) { return number("count", count); }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **gpu) { *gpu = NULL; return index ? NOT_FOUND : OK; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **gpu) {
    char mine[512];
    *gpu = NULL;
    return text("uuid", mine, sizeof mine) == OK && !strcmp(uuid, mine) ? OK : NOT_FOUND;
}

int nvmlDeviceGetName(void *gpu, char *found, unsigned int size) { (void)gpu; return text("name", found, size); }
int nvmlDeviceGetUUID(void *gpu, char *found, unsigned int size) { (void)gpu; return text("uuid", found, size); }
int nvmlSystemGetDriverVersion(char *found, unsigned int size) { return text("driver", found, size); }
int nvmlSystemGetCudaDriverVersion_v2(unsigned int *found) { return number("cuda", found); }
int nvmlDeviceGetCudaComputeCapability(void *gpu, int *major, int *minor) {
    char said[512];
    int code = text("compute_capability", said, sizeof said);
    (void)gpu;
    if (code == OK) sscanf(said, "%d.%d", major, minor);
    return code;
}
int nvmlDeviceGetUtilizationRates(void *gpu, Utilization *found) {
    (void)gpu;
    found->memory = 0;
    return number("utilization", &found->gpu);
}
int nvmlDeviceGetTemperature(void *gpu, int sensor, unsigned int *found) {
    (void)gpu, (void)sensor;
    return number("temperature", found);
}
int nvmlDeviceGetPowerUsage(void *gpu, unsigned int *found) { (void)gpu; return number("power", found); }
int nvmlDeviceGetEnforcedPowerLimit(void *gpu, unsigned int *found) { (void)gpu; return number("power_limit", found); }
int nvmlDeviceGetClockInfo(void *gpu, int kind, unsigned int *found) {
    (void)gpu, (void)kind;
    return number("sm_clock", found);
}
int nvmlDeviceGetMaxClockInfo(void *gpu, int kind, unsigned int *found) {
    (void)gpu, (void)kind;
    return number("max_sm_clock", found);
}
int nvmlDeviceGetPerformanceState(void *gpu, unsigned int *found) { (void)gpu; return number("performance_state", found); }
int nvmlDeviceGetCurrentClocksEventReasons(void *gpu, unsigned long long *found) {
    unsigned int reasons = 0;
    int code = number("clock_reasons", &reasons);
    (void)gpu;
    *found = reasons;
    return code;
}
int nvmlDeviceGetMemoryInfo(void *gpu, Memory *found) {
    char said[512];
    int code = text("memory", said, sizeof said);
    (void)gpu;
    if (code == OK) sscanf(said, "%llu %llu %llu", &found->total, &found->used, &found->free);
    return code;
}

/* Lines "process PID BYTES"; PID "self" is whoever asks. */
int nvmlDeviceGetComputeRunningProcesses_v3(void *gpu, unsigned int *count, Process *found) {
    FILE *file = recording();
    char line[512], pid[32];
    unsigned int seen = 0, room = *count;
    unsigned long long bytes;
    (void)gpu;
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "process %31s %llu", pid, &bytes) != 2) continue;
        if (found && seen < room) {
            memset(&found[seen], 0, sizeof *found);
            found[seen].pid = strcmp(pid, "self") ? (unsigned int)strtoul(pid, NULL, 10) : (unsigned int)getpid();
            found[seen].used = bytes;
        }
        seen++;
    }
    if (file) fclose(file);
    *count = seen;
    return seen > room ? INSUFFICIENT_SIZE : OK;
}
