{{- define "name" -}}
{{- $name := ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* What selects every pod of this release. */}}
{{- define "selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "labels" -}}
{{ include "selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "image" -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- end }}

{{- define "claim" -}}
{{ .Values.storage.existingClaim | default (printf "%s-data" (include "name" .)) }}
{{- end }}

{{- define "logUrl" -}}
{{ .Values.log.kafka.url | default "sqlite:////var/lib/instructloop/log.db" }}
{{- end }}

{{/* Which ports the other ends of the server listen on; a list, as JSON. */}}
{{- define "portsAway" -}}
{{- $ports := list -}}
{{- range splitList "," (regexReplaceAll "^kafka://([^/]*)/.*$" .Values.log.kafka.url "${1}") -}}
{{- $ports = append $ports (regexFind "[0-9]+$" .) -}}
{{- end -}}
{{- if .Values.redis.existingSecret -}}
{{- $ports = append $ports (toString .Values.redis.port) -}}
{{- end -}}
{{- with .Values.settings.INSTRUCTLOOP_OTLP_ENDPOINT -}}
{{- $url := urlParse . -}}
{{- $usual := ternary "443" "80" (eq $url.scheme "https") -}}
{{- $ports = append $ports (regexFind "[0-9]+$" $url.host | default $usual) -}}
{{- end -}}
{{- compact $ports | uniq | toJson -}}
{{- end }}

{{/* A number as it was written: Go's own form of large ones has an exponent. */}}
{{- define "text" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end }}

{{/* Seconds until those who send here know that a replica ends; and in all until it is killed: these,
what runs then, and the last events. */}}
{{- define "pauseSeconds" -}}10{{- end }}
{{- define "graceSeconds" -}}
{{ add (include "pauseSeconds" .) (.Values.settings.INSTRUCTLOOP_SHUTDOWN_BOUND_S | default 60) 30 }}
{{- end }}
