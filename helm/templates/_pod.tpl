{{/* What the pods of the server, of a round and of a test have in common. */}}

{{- define "pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Vault, keys and registry are files that SQLite and flock guard: one node has them all. */}}
{{- define "oneNode" -}}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
affinity:
  podAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "selector" . | nindent 12 }}
            instructloop/volume: {{ include "claim" . }}
{{- end }}

{{- define "container" -}}
image: {{ include "image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* Where a process keeps things, as the command line's variables, so that commands find them, too. */}}
{{- define "environment" -}}
- name: HOME
  value: /tmp
- name: INSTRUCTLOOP_LOG
  value: {{ include "logUrl" . | quote }}
- name: INSTRUCTLOOP_REGISTRY
  value: /var/lib/instructloop/registry
- name: INSTRUCTLOOP_KEYS
  value: /var/lib/instructloop/keys.db
- name: INSTRUCTLOOP_VAULT
  value: /var/lib/instructloop/vault.db
- name: INSTRUCTLOOP_MASTER_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .Values.masterKey.existingSecret }}
      key: {{ .Values.masterKey.key }}
{{- with .Values.log.kafka.existingSecret }}
- name: INSTRUCTLOOP_KAFKA_USERNAME
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: username
- name: INSTRUCTLOOP_KAFKA_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: password
{{- end }}
{{- if .Values.log.kafka.existingCaSecret }}
- name: INSTRUCTLOOP_KAFKA_CA
  value: /etc/instructloop/kafka/ca.crt
{{- end }}
{{- range $name, $value := .Values.settings }}
- name: {{ $name }}
  value: {{ include "text" $value | quote }}
{{- end }}
{{- end }}

{{/* Threads of the engine and of training, which would count the node's cores. */}}
{{- define "threads" -}}
{{- if dig "limits" "cpu" "" . }}
- name: OMP_NUM_THREADS
  valueFrom:
    resourceFieldRef:
      resource: limits.cpu
{{- end }}
{{- end }}

{{- define "mounts" -}}
- name: data
  mountPath: /var/lib/instructloop
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
{{- if .Values.log.kafka.existingCaSecret }}
- name: kafka-ca
  mountPath: /etc/instructloop/kafka
  readOnly: true
{{- end }}
{{- end }}

{{/* Of [the chart, a workload]. */}}
{{- define "volumes" -}}
{{- $root := first . -}}
{{- $workload := last . -}}
- name: data
  persistentVolumeClaim:
    claimName: {{ include "claim" $root }}
- name: tmp
  emptyDir:
    sizeLimit: {{ $workload.scratch }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ $workload.sharedMemory }}
{{- with $root.Values.log.kafka.existingCaSecret }}
- name: kafka-ca
  secret:
    secretName: {{ . }}
    items:
      - key: ca.crt
        path: ca.crt
{{- end }}
{{- end }}
