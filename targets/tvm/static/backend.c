// What compiled kernels expect of a runtime: threads, scratch memory, a place for errors.
#define _DEFAULT_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "tables.h"

enum { ALIGNMENT = 64, SPINS = 1000, QUIET_SPINS = 200 };

// as in TVM's c_backend_api.h
typedef struct {
  void* sync;
  int32_t count;
} Group;
typedef int (*Task)(int, Group*, void*);

typedef struct {
  pthread_t thread;
  gammac_pool* pool;
  int index;
} Worker;

struct gammac_pool {
  int threads, started;
  Worker* workers;  // of threads 1 and up; the caller is thread 0
  pthread_mutex_t mutex;
  pthread_cond_t wake, done;
  atomic_uint round;  // a new one is a new launch
  atomic_int running, failed;
  int stop;
  Task task;
  void* data;
  Group group;
};

static _Thread_local gammac_pool* current;

static void supply(void);

// ---- threads ----

static void run_share(gammac_pool* pool, int first) {
  for (int i = first; i < pool->group.count; i += pool->threads) {
    if (pool->task(i, &pool->group, pool->data) != 0) atomic_store(&pool->failed, 1);
  }
}

// Kernels follow one another within microseconds; where cores are shared, the one that is awaited needs this one.
static void stand_by(int spin) {
  if (spin >= QUIET_SPINS) sched_yield();
}

static unsigned next_round(gammac_pool* pool, unsigned seen) {
  for (int i = 0; i < SPINS; ++i) {
    const unsigned round = atomic_load(&pool->round);
    if (round != seen) return round;
    stand_by(i);
  }
  pthread_mutex_lock(&pool->mutex);
  while (atomic_load(&pool->round) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
  pthread_mutex_unlock(&pool->mutex);
  return atomic_load(&pool->round);
}

static void* work(void* argument) {
  Worker* worker = argument;
  gammac_pool* pool = worker->pool;
  for (unsigned round = 0;;) {
    round = next_round(pool, round);
    if (pool->stop) return NULL;
    run_share(pool, worker->index);
    if (atomic_fetch_sub(&pool->running, 1) == 1) {
      pthread_mutex_lock(&pool->mutex);
      pthread_cond_signal(&pool->done);
      pthread_mutex_unlock(&pool->mutex);
    }
  }
}

static void start_round(gammac_pool* pool) {
  atomic_store(&pool->running, pool->started);
  pthread_mutex_lock(&pool->mutex);
  atomic_fetch_add(&pool->round, 1);
  pthread_cond_broadcast(&pool->wake);
  pthread_mutex_unlock(&pool->mutex);
}

static void await_round(gammac_pool* pool) {
  for (int i = 0; i < SPINS; ++i) {
    if (atomic_load(&pool->running) == 0) return;
    stand_by(i);
  }
  pthread_mutex_lock(&pool->mutex);
  while (atomic_load(&pool->running) != 0) pthread_cond_wait(&pool->done, &pool->mutex);
  pthread_mutex_unlock(&pool->mutex);
}

static int launch(Task task, void* data, int count) {
  gammac_pool* pool = current;
  pool->task = task;
  pool->data = data;
  pool->group = (Group){NULL, count > 0 ? count : pool->threads};
  atomic_store(&pool->failed, 0);
  const int alone = pool->started == 0 || pool->group.count == 1;
  if (!alone) start_round(pool);
  run_share(pool, 0);
  if (!alone) await_round(pool);
  return atomic_load(&pool->failed) ? -1 : 0;
}

gammac_pool* gammac_pool_new(int threads) {
  gammac_pool* pool = calloc(1, sizeof(gammac_pool));
  if (pool == NULL) return NULL;
  supply();
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->wake, NULL);
  pthread_cond_init(&pool->done, NULL);
  pool->threads = threads;
  pool->workers = calloc((size_t)threads, sizeof(Worker));
  for (int i = 1; pool->workers != NULL && i < threads; ++i) {
    Worker* worker = &pool->workers[i - 1];
    *worker = (Worker){.pool = pool, .index = i};
    if (pthread_create(&worker->thread, NULL, work, worker) != 0) break;
    ++pool->started;
  }
  if (pool->started == threads - 1 && pool->workers != NULL) return pool;
  gammac_pool_free(pool);
  return NULL;
}

void gammac_pool_free(gammac_pool* pool) {
  if (pool == NULL) return;
  pool->stop = 1;
  start_round(pool);
  for (int i = 0; i < pool->started; ++i) pthread_join(pool->workers[i].thread, NULL);
  pthread_cond_destroy(&pool->done);
  pthread_cond_destroy(&pool->wake);
  pthread_mutex_destroy(&pool->mutex);
  free(pool->workers);
  free(pool);
}

// ---- memory and errors ----

static void* workspace(int device_type, int device, uint64_t size, int code, int bits) {
  (void)device_type, (void)device, (void)code, (void)bits;
  return aligned_alloc(ALIGNMENT, (size_t)(size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

static int release(int device_type, int device, void* data) {
  (void)device_type, (void)device;
  free(data);
  return 0;
}

// Kernels raise only where they are called with the wrong tensors, and say so by their result, too.
void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  (void)kind, (void)parts, (void)count;
}

// each is there if a kernel needs it
extern void *__TVMBackendParallelLaunch, *__TVMBackendAllocWorkspace, *__TVMBackendFreeWorkspace;
#pragma weak __TVMBackendParallelLaunch
#pragma weak __TVMBackendAllocWorkspace
#pragma weak __TVMBackendFreeWorkspace

static void supply(void) {
  if (&__TVMBackendParallelLaunch != NULL) __TVMBackendParallelLaunch = (void*)launch;
  if (&__TVMBackendAllocWorkspace != NULL) __TVMBackendAllocWorkspace = (void*)workspace;
  if (&__TVMBackendFreeWorkspace != NULL) __TVMBackendFreeWorkspace = (void*)release;
}

void gammac_pool_use(gammac_pool* pool) { current = pool; }
